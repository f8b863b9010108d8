"""HTML of the report: escaped texts, tables, pictures inside the file, and the room that they may take."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from googlenet_jax.host.errors import one_line

NAME = 60  # letters of a name; a longer one loses its middle
PNG_UP_TO = 64  # pixels: smaller pictures are kept exactly, larger ones become JPEG
QUALITY = 80  # JPEG's own scale, up to 95


class Room:
  """The bytes that pictures may still take. What does not fit is left out and counted."""

  def __init__(self, size: int):
    """Begins with `size` bytes."""
    self.size, self.left, self.left_out = size, size, 0

  def take(self, *parts: str) -> bool:
    """Returns whether there is room for texts of HTML, and takes it."""
    size = sum(len(part.encode()) for part in parts)
    if size > self.left:
      self.left_out += 1
      return False
    self.left -= size
    return True


# Text ----------------------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
  """Returns a text in one line for HTML: nothing in it is markup, and control characters become escapes."""
  return html.escape(one_line(str(value)))


def short(value: Any, most: int = NAME) -> str:
  """Returns a name of at most `most` letters: a long one loses its middle, because names often differ at the end."""
  value = str(value)
  return value if len(value) <= most else f'{value[: most // 2]}…{value[-(most - most // 2 - 1) :]}'


def name(value: Any, most: int = NAME) -> str:
  """Returns a user's name for HTML, shortened; one that is written from right to left does not turn what follows."""
  return f'<bdi>{text(short(value, most))}</bdi>'


# Elements ------------------------------------------------------------------------------------------------------------


def section(anchor: str, title: str, *parts: str) -> str:
  """Returns a section with a heading; empty parts are left out."""
  inside = '\n'.join(filter(None, parts))
  return f'<section id="{anchor}" aria-labelledby="{anchor}-h">\n<h2 id="{anchor}-h">{title}</h2>\n{inside}\n</section>'


def paragraph(inside: str, kind: str = '') -> str:
  """Returns a paragraph; empty for an empty text."""
  return f'<p{f" class={kind}" if kind else ""}>{inside}</p>' if inside else ''


def table(
  head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, words: int = 1, has_sum: bool = False
) -> str:
  """Returns a table that can be scrolled sideways. The first cell of each row is its heading.

  Args:
    head: heading of each column, as HTML like all cells.
    rows: the cells.
    caption: says what the table is.
    words: the first columns that are words; the others are numbers, aligned on the right.
    has_sum: whether the last row is a sum or a mean.
  """
  kinds = ['' if place < words else ' class=n' for place in range(len(head))]
  lines = [''.join(f'<th scope=col{kind}>{cell}</th>' for kind, cell in zip(kinds, head, strict=True))]
  for first, *cells in rows:
    rest = ''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds[1:], cells, strict=True))
    lines.append(f'<th scope=row>{first}</th>{rest}')
  top, *below = (f'<tr>{line}</tr>' for line in lines)
  if has_sum:
    below[-1] = below[-1].replace('<tr>', '<tr class=sum>', 1)
  inside = f'<caption>{caption}</caption>\n<thead>{top}</thead>\n<tbody>\n' + '\n'.join(below) + '\n</tbody>'
  return scrolled(f'<table>{inside}</table>', caption)


def scrolled(inside: str, label: str) -> str:
  """Returns a part of the page that is scrolled sideways where it is too wide, also with the keyboard."""
  return f'<div class=wide role=region aria-label="{label}" tabindex=0>{inside}</div>'


def details(summary: str, inside: str) -> str:
  """Returns a part of the page that is folded up until somebody opens it."""
  return f'<details><summary>{summary}</summary>\n{inside}\n</details>'


# Pictures ------------------------------------------------------------------------------------------------------------


def picture(image: Image.Image, alt: str, side: int) -> str:
  """Returns an image element with the picture inside.

  Args:
    image: the picture; no larger than it must be.
    alt: says what it shows, as plain text.
    side: length of its longer side on the page, in CSS pixels.
  """
  longest, stream = max(image.size), io.BytesIO()
  kind = 'png' if longest <= PNG_UP_TO else 'jpeg'
  image.save(stream, kind, **({'optimize': True} if kind == 'png' else {'quality': QUALITY}))
  data = base64.b64encode(stream.getvalue()).decode()
  width, height = (max(1, round(side * length / longest)) for length in image.size)
  squares = ' class=px' if longest < side else ''  # enlarged pixels stay squares
  source = f'data:image/{kind};base64,{data}'
  return f'<img src="{source}" width={width} height={height} alt="{text(alt)}" decoding=async{squares}>'


def figure(pictures: Sequence[str], caption: str) -> str:
  """Returns pictures beside each other, and a caption below them."""
  return f'<figure><div>{"".join(pictures)}</div><figcaption>{caption}</figcaption></figure>'


def gallery(figures: Sequence[str], kind: str = '') -> str:
  """Returns figures in as many columns as the page is wide."""
  return f'<div class="gallery {kind}">\n' + '\n'.join(figures) + '\n</div>'
