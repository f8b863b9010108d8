"""Changes files at random, as damage and as somebody with bad intentions would."""

import contextlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

INTERESTING = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
ODD_VALUES = [
  *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float('nan'), float('inf'), [], {}, [[]], [1, 'x']),
  *('', 'x', 'é日本', '\x00\n\x1b[2J', '../../x', 'a' * 1000, {'a': {}}, 'test', 'validation', 'train', 'nan'),
]


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
  """Changes some bytes, numbers or pieces."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
    place, kind = rng.randrange(len(data) + 1), rng.randrange(9)
    length = rng.choice((1, 2, 4, 8, 16, rng.randint(1, 200)))
    if kind == 0 and data:
      data[place % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
      data[place : place + 1] = bytes([rng.choice(INTERESTING) % 256])
    elif kind == 2:
      del data[place : place + length]
    elif kind == 3:
      data[place:place] = rng.randbytes(length)
    elif kind == 4:
      data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
    elif kind == 5:
      del data[place:]
    elif kind == 6:
      form = rng.choice(('<I', '>I', '<Q', '>Q', '<H', '>H'))
      packed = struct.pack(form, rng.choice(INTERESTING) % (1 << 8 * struct.calcsize(form)))
      place = rng.choice((place, rng.randrange(40)))  # headers are short
      data[place : place + len(packed)] = packed
    elif kind == 7:
      other = rng.choice(others)
      data[place:] = other[rng.randrange(len(other) + 1) :]
    else:
      data[place : place + length] = bytes(length)
  return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
  """Replaces, removes or adds a value somewhere in a tree."""
  places = []

  def walk(node):
    for key in list(node) if isinstance(node, dict) else range(len(node)):
      places.append((node, key))
      if isinstance(node[key], dict | list):
        walk(node[key])

  value = json.loads(json.dumps(value))
  walk(value)
  if not places or rng.random() < 0.02:
    return rng.choice(ODD_VALUES)
  for _ in range(rng.choice((1, 1, 2, 3))):
    node, key = rng.choice(places)
    with contextlib.suppress(KeyError, IndexError):  # it is gone already
      match rng.randrange(5):
        case 0:
          del node[key]
        case 1 if isinstance(node, dict):
          node[rng.choice(('x', '', 'recipe', 'seed', 'a.b', 'é'))] = rng.choice(ODD_VALUES)
        case 2:
          node[key] = [node[key]] * rng.choice((1, 2, 100))
        case _:
          node[key] = rng.choice(ODD_VALUES)
  return value


def as_json(value: Any, rng: random.Random) -> bytes:
  """Writes a mutated tree, sometimes with mutated bytes."""
  data = json.dumps(mutate_json(value, rng), ensure_ascii=rng.random() < 0.5).encode('utf-8', 'surrogatepass')
  if rng.random() < 0.02:
    data = b'[' * 100_000 + data
  return mutate(data, [data], rng) if rng.random() < 0.3 else data


def mutate_zip(data: bytes, rng: random.Random, change: Callable[[str, bytes], bytes]) -> bytes:
  """Changes one member of a zip archive; its checksums are right again."""
  out = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
    names = old.namelist()
    chosen = rng.choice(names)
    for name in names:
      inside = old.read(name)
      target = rng.choice(('../../' + name, '/tmp/' + name, name)) if name == chosen and rng.random() < 0.1 else name
      new.writestr(target, change(name, inside) if name == chosen else inside)
  return out.getvalue()


def with_png_checksums(data: bytes) -> bytes:
  """Makes the checksum of each chunk right again, so that a decoder goes on."""
  out, place = data[:8], 8
  while place + 12 <= len(data):
    (length,) = struct.unpack('>I', data[place : place + 4])
    body = data[place + 4 : place + 8 + length]
    out += data[place : place + 4] + body + struct.pack('>I', zlib.crc32(body))
    place += 12 + length
  return out
