"""Reads and writes files of weights: a flat dict from tensor names to arrays, see `torch_weights.py`.

The arrays are NumPy's. PyTorch is imported only to read or write a `.pth` or `.pt` file.
"""

import importlib
import io
import pathlib
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from googlenet_jax.host.errors import UserError, expanded
from googlenet_jax.host.files import replacing


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors in a `.pth`, `.pt` or `.safetensors` file. It unpickles tensors only.

  Args:
    path: a file with a flat dict of tensors, such as `torch.save(model.state_dict(), path)` writes.

  Returns:
    Tensor name to array, in the file's dtype; bfloat16, which NumPy lacks, becomes float32.

  Raises:
    UserError: the file is missing, damaged, of another kind, or holds something else; or the package that reads it is
      not installed.
  """
  path = expanded(path)
  reader, _ = _functions(path)
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  return reader(path, data)


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors to a `.pth`, `.pt` or `.safetensors` file.

  Args:
    path: the file; its suffix decides the format. An existing file is replaced.
    tensors: name to array, as `to_torch` returns them.

  Raises:
    UserError: the suffix is another one, the file cannot be written, or the package that writes it is not installed.
  """
  path = expanded(path)
  _, writer = _functions(path)
  data = writer(path, tensors)
  try:
    with replacing(path) as temporary:  # if the disk is full, the old file stays
      temporary.write_bytes(data)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error


def _functions(path: pathlib.Path):
  functions = {
    '.pth': (_read_torch, _write_torch),
    '.pt': (_read_torch, _write_torch),
    '.safetensors': (_read_safetensors, _write_safetensors),
  }
  if path.suffix not in functions:
    raise UserError(f'{path} does not look like a file of weights: its name must end with {", ".join(functions)}')
  return functions[path.suffix]


def _package(name: str, path: pathlib.Path):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(f'{path}: {path.suffix} files need the package {name}: pip install {name}') from error


def _read_torch(path: pathlib.Path, data: bytes) -> dict[str, np.ndarray]:
  torch = _package('torch', path)
  try:
    # PyTorch writes checksums but does not check them.
    if zipfile.is_zipfile(io.BytesIO(data)) and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
      raise zipfile.BadZipFile('wrong checksum')
    found = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
  except Exception as error:  # damaged bytes can raise anything in its unpickler
    raise UserError(
      f'{path} is damaged or holds more than tensors: write it with torch.save(model.state_dict(), path)'
    ) from error
  if not isinstance(found, Mapping):
    raise UserError(f'{path} holds a {type(found).__name__}, not a flat dict of tensors: save model.state_dict()')
  tensors = {}
  for name, tensor in found.items():
    if not isinstance(tensor, torch.Tensor):
      kind = type(tensor).__name__
      raise UserError(f'{path} is not a flat dict of tensors: {name!r} is a {kind}; save model.state_dict() alone')
    try:
      # NumPy has no bfloat16; float32 holds its values.
      tensors[name] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().numpy()
    except (RuntimeError, TypeError) as error:
      raise UserError(
        f'{path}: {name!r} is not a plain tensor ({tensor.layout}, {tensor.dtype}): save dense tensors of numbers'
      ) from error
  return tensors


def _write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> bytes:
  torch = _package('torch', path)
  buffer = io.BytesIO()
  torch.save({name: torch.tensor(array) for name, array in tensors.items()}, buffer)
  return buffer.getvalue()


SAFETENSORS_TYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
  'I64': np.int64,
}


def _read_safetensors(path: pathlib.Path, data: bytes) -> dict[str, np.ndarray]:
  safetensors = _package('safetensors', path)
  try:
    entries = safetensors.deserialize(data)
  except safetensors.SafetensorError as error:
    raise UserError(f'{path} is damaged ({error}): copy or download it again') from error
  tensors = {}
  for name, entry in entries:
    if entry['dtype'] not in SAFETENSORS_TYPES:
      raise UserError(f'{path}: {name!r} is {entry["dtype"]}: expected one of {", ".join(SAFETENSORS_TYPES)}')
    try:
      array = np.frombuffer(entry['data'], SAFETENSORS_TYPES[entry['dtype']]).reshape(entry['shape'])
    except ValueError as error:  # no numbers, but 2^62 rows of them
      raise UserError(f'{path}: {name!r} has an impossible shape ({error}): copy or download it again') from error
    tensors[name] = array.astype(np.float32) if entry['dtype'] == 'BF16' else array
  return tensors


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> bytes:
  _package('safetensors', path)
  from safetensors.numpy import save

  return save(dict(tensors))
