"""A run as the page shows it: it may still be training, and what is not known yet comes in the background."""

import contextlib
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, reason
from googlenet_jax.page import answers, parts, results
from googlenet_jax.page.results import Results
from googlenet_jax.page.subject import NO_DATA, Subject, can_answer, is_weights, run_in, without_weights

LOOK_SECONDS = 3.0  # between looks for the first checkpoint
ANSWERING = 'Answering the test images: tables and pictures follow.'
NO_CHECKPOINT = 'There is no checkpoint yet. The curves are here already; the rest follows by itself.'
WEIGHTS = (
  'A file of weights has no test images and no curves, and its classes are numbers. How the pictures of its training '
  'were prepared is not known: {size} pixels and the rest are assumed, as for the networks of the paper. If it was '
  'otherwise, the answers are unreliable.'
)
TROUBLE = 'Something cannot be read; the terminal in which the page was started says what.'


class Known(NamedTuple):
  """What is known of a run at a moment. It is replaced whole, so every reader sees things that belong together."""

  note: str  # what is missing, or under way; empty if nothing is
  classifier: Classifier | None = None  # None without a checkpoint
  subject: Subject | None = None  # None for a file of weights
  parts: Mapping[str, str] = {}  # HTML of the parts of the page; see `parts.render`
  number: int = 0  # grows with each change


class LiveRun:
  """A run, an ensemble or a file of weights that a page shows.

  The newest checkpoint is read when the page starts, and again when somebody opens or reloads the page. A run without a
  checkpoint is looked at every few seconds until there is one.

  Attributes:
    workdir: the folder, or the file.
    known: what is known now.
  """

  def __init__(self, workdir: pathlib.Path, step: int | str | None = None, data: Mapping[str, str] | None = None):
    """Loads the network, if there is a checkpoint.

    Args:
      workdir: folder of a run or an ensemble, or a file of weights.
      step: step of the checkpoint, 'best', or None for the newest.
      data: where the run's images are now, as for `loading.load`.

    Raises:
      UserError: there is no run, or no such checkpoint.
    """
    self.workdir, self._step, self._data = workdir, step, data
    self.is_run = not is_weights(workdir)
    self._saved = self._checkpoints()
    self._asked, self._closed = threading.Event(), False
    self._thread = threading.Thread(target=self._work, daemon=True)
    self.known = Known('')
    if not self.is_run:
      classifier = self._load()
      self._know(note=WEIGHTS.format(size=classifier.recipe.image_size), classifier=classifier)
    elif step is None and not can_answer(workdir):
      self._know(note=NO_CHECKPOINT, subject=self._subject(without_weights(run_in(workdir))))
    else:
      self._take(self._load())

  @property
  def name(self) -> str:
    """Folder or file, as short as it is clear."""
    return self.workdir.name or str(self.workdir.resolve())

  def start(self) -> None:
    """Begins the work in the background."""
    if self.is_run:
      self._thread.start()

  def look(self) -> None:
    """Asks for a look whether there is a newer checkpoint. Returns at once."""
    self._asked.set()

  def close(self) -> None:
    """Ends the work, and waits for what is under way."""
    self._closed = True
    self._asked.set()
    if self._thread.is_alive():
      self._thread.join()

  def heading(self) -> str:
    """Returns the heading of the page as HTML."""
    return parts.heading(self.name, self.known.classifier, self.known.subject, self.known.note)

  def answer(
    self, read: Callable[[Classifier], np.ndarray] | None, group: str, with_title: bool, true: str | None = None
  ) -> str:
    """Returns the answer to a picture as HTML, or what is wrong with the picture.

    Args:
      read: returns the picture for a network, see `answers.read`; None to ask for one.
      group: name of the choice of classes; see `answers.html_of`.
      with_title: whether the name of the run stands above.
      true: the class of the picture, where it is known.
    """
    known = self.known
    title = parts.title(self.name, known.classifier if read else None) if with_title else ''
    try:
      if read is None:
        inside = '<p class=soft>The answer to your picture appears here.</p>'
      elif known.classifier is None:
        inside = answers.trouble(NO_CHECKPOINT)
      else:
        found = answers.answer(known.classifier, read(known.classifier))
        inside = answers.html_of(found, group, true if true in known.classifier.classes else None)
    except UserError as error:
      inside = answers.trouble(str(error))
    return f'<section class=answer>{title}{inside}</section>'

  # The work in the background ---------------------------------------------------------------------------------------

  def _work(self) -> None:
    self._safely(self._answer)
    while True:
      self._asked.wait(None if self.known.classifier else LOOK_SECONDS)
      self._asked.clear()
      if self._closed:
        return
      self._safely(self._load_newer)

  def _safely(self, work: Callable[[], None]) -> None:
    """Keeps the page alive whatever happens to a checkpoint or a data set.

    The reason stays in the terminal: it may name folders of this machine, and the page may be open to others.
    """
    try:
      work()
    except Exception as error:
      console.complain(f'warning: {self.workdir}: {reason(error)}')
      self._know(note=TROUBLE)

  def _checkpoints(self) -> list[tuple[str, int]]:
    """Returns the checkpoints and the recipes of all members, with times: another run may take its place."""
    if not self.is_run:
      return []
    found = []
    for folder in (self.workdir, *self.workdir.glob('member_*')):
      saved = (path for name in ('checkpoints', 'replaced') for path in folder.glob(f'{name}/*') if path.name.isdigit())
      for path in (folder / runs.FILE, *saved):
        with contextlib.suppress(OSError):  # not there, or deleted meanwhile
          found.append((str(path), path.stat().st_mtime_ns))
    return sorted(found)

  def _load(self) -> Classifier:
    return loading.load(self.workdir, self._step, data=self._data)

  def _load_newer(self) -> None:
    saved = self._checkpoints()
    if saved == self._saved or (self._step is None and not can_answer(self.workdir)):
      return
    self._saved = saved  # now: what cannot be read is not tried again and again
    loaded, before = self._load(), self.known.classifier
    if before is None or not _are_alike(loaded, before):  # another recipe, or another run in this folder
      self._take(loaded)
    elif loaded.steps == before.steps and _are_equal(loaded.networks, before.networks):
      return
    else:
      self._take(before.with_networks(loaded.networks, loaded.steps))  # its programs are compiled already
    self._answer()

  def _take(self, classifier: Classifier) -> None:
    self._know(note=ANSWERING, classifier=classifier, subject=self._subject(classifier))

  def _answer(self) -> None:
    """Answers the test images, and makes the parts of the page that show them."""
    if self.known.classifier is None:
      self._know(parts=parts.render(self.known.subject))
      return
    say = lambda why: console.say(f'note: {self.workdir}: {why}')
    found = results.load_results(self.workdir, self.known.classifier, say=say)
    subject = self._subject(self.known.classifier, found)
    self._know(note=NO_DATA if found is None else found.note, subject=subject, parts=parts.render(subject))

  def _subject(self, classifier: Classifier, found: Results | None = None) -> Subject:
    return Subject(self.workdir, run_in(self.workdir), classifier, found, ())

  def _know(self, **changes: Any) -> None:
    self.known = self.known._replace(number=self.known.number + 1, **changes)


def _are_alike(one: Classifier, other: Classifier) -> bool:
  """Returns whether two classifiers differ in their weights only."""
  what = lambda classifier: (classifier.recipe.to_dict(), classifier.classes, classifier.channels)
  return what(one) == what(other)


def _are_equal(one: Any, other: Any) -> bool:
  """Returns whether all arrays of two trees of the same shape are equal."""
  return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
