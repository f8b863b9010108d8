"""Whole runs: what they write, how they stop, how they continue."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import draw_nothing, make_whole_runs_cheap, read_log, small_config, small_digits, take_devices

import googlenet_jax
from googlenet_jax import runs
from googlenet_jax.data import augment, datasets, pipeline, random_keys, splits
from googlenet_jax.evaluation import galleries, statistics, table
from googlenet_jax.host import checkpoints, program, progress, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.training import ensemble, evaluator, loop, optimizers, plan
from googlenet_jax.training.log import MetricsLog
from googlenet_jax.training.state import ITEMS

ROOT = pathlib.Path(__file__).parent.parent
# Everything that could make two runs differ is on.
CONFIG = {
  'batch_size': 32,  # 11 steps an epoch
  'epochs': 2,
  'learning_rate': 0.3,
  'schedule': 'cosine',
  'model.norm': 'batch',
  'model.dropout': 0.3,
  'augment.shift': 2,
  'augment.flip': True,
  'augment.min_area': 0.5,
  'augment.random_interpolation': True,
  'augment.photometric': 0.3,
  'augment.erasing': 0.3,
  'average_decay': 0.9,
  'model.auxiliary': 'adaptive_pool',
  'ensemble.member': 1,  # its seed is not 0
  'log_every_steps': 4,
}


@pytest.fixture(scope='module', autouse=True)
def cheap():
  with pytest.MonkeyPatch.context() as patch:
    make_whole_runs_cheap(patch)
    yield


@dataclasses.dataclass
class Whole:
  workdir: pathlib.Path
  printed: str
  drawn: list  # arguments of galleries.augmentations


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run from beginning to end."""
  workdir, drawn, draw = tmp_path_factory.mktemp('whole'), [], galleries.augmentations
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
    patch.setattr(galleries, 'augmentations', lambda *arguments: (drawn.append(arguments), draw(*arguments)))
    loop.train(small_config(**CONFIG), workdir, StopRequest())
  return Whole(workdir, printed.getvalue(), drawn)


@pytest.fixture(scope='module')
def stopped(whole, tmp_path_factory):
  """The same run, which a signal stopped in its sixth step; and what it printed."""
  workdir, advance = tmp_path_factory.mktemp('stopped'), progress.Progress.advance

  def advance_and_kill(self, step):
    advance(self, step)
    if step == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
    patch.setattr(progress.Progress, 'advance', advance_and_kill)
    patch.setattr(program, 'is_program', lambda: True)
    with pytest.raises(SystemExit) as ended:
      ensemble.train(small_config(**CONFIG), workdir)
  assert ended.value.code == 128 + signal.SIGTERM
  return workdir, printed.getvalue()


@pytest.fixture
def no_pictures(monkeypatch):
  draw_nothing(monkeypatch)


def copy(workdir, to):
  shutil.copytree(workdir, to, dirs_exist_ok=True)
  return to


def last_state(workdir):
  """The arrays of the newest checkpoint, as saved."""
  saved = checkpoints.Checkpoints(workdir)
  step = saved.steps()[0]
  arguments = {item: ocp.args.StandardRestore() for item in ITEMS}
  state = dict(saved._manager.restore(step, args=ocp.args.Composite(**arguments)).items())
  saved.close()
  return step, state


def assert_same_run(workdir, reference):
  step, state = last_state(workdir)
  expected_step, expected = last_state(reference)
  assert step == expected_step == 22
  assert len(jax.tree.leaves(state)) > 60
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
  # The log has no gaps and no repetitions either.
  ours, theirs = ([r for r in read_log(w) if r['split'] == 'test'] for w in (workdir, reference))
  assert [r['step'] for r in ours] == [11, 22]
  assert [r['loss'] for r in ours] == [r['loss'] for r in theirs]
  summaries = [json.loads((w / 'summary.json').read_text()) for w in (workdir, reference)]
  for key in ('train_loss', 'test_accuracy', 'test_accuracy_raw'):
    assert summaries[0][key] == summaries[1][key]


# Stopping and continuing ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures('no_pictures')
def test_a_signal_saves_and_the_same_command_continues_bit_for_bit(whole, stopped, tmp_path, capsys):
  workdir, printed = stopped
  assert 'stopped at step 6 of 22, saved\nThe same command continues: python ' in printed
  loop.train(small_config(**CONFIG), copy(workdir, tmp_path), StopRequest())
  assert 'continuing after step 6 of 22' in capsys.readouterr().out
  assert_same_run(tmp_path, whole.workdir)


@pytest.mark.usefixtures('no_pictures')
def test_several_steps_a_call_stop_and_continue_bit_for_bit(tmp_path, monkeypatch, capsys):
  """Checkpoints, log points and epochs keep their steps; that the steps are those of single calls: test_step.py.

  On two devices; the other tests here take one.
  """
  take_devices(monkeypatch, 2)
  some = {name: CONFIG[name] for name in ('batch_size', 'epochs', 'schedule', 'average_decay', 'log_every_steps')}
  config = small_config(**some, steps_per_call=5, checkpoint_every_steps=10, **{'augment.shift': 2})
  stop = StopRequest()
  reference, workdir = tmp_path / 'reference', tmp_path / 'stopped'
  loop.train(config, reference, stop)
  ends, advance = [], progress.Progress.advance

  def advance_and_stop(self, step):
    ends.append(step)
    advance(self, step)
    stop.signal = signal.SIGTERM if step == 9 else None

  monkeypatch.setattr(progress.Progress, 'advance', advance_and_stop)
  loop.train(config, workdir, stop)
  assert '4 steps a call; the training images are in the memory of each device (0.024 MB)' in (
    printed := capsys.readouterr().out
  )
  assert 'stopped at step 9 of 22, saved' in printed
  stop.signal = None
  loop.train(config, workdir, stop)
  # Log points at multiples of 4, ends of epochs at 11 and 22, checkpoints at 10 and 20. Calls have four steps or one.
  assert ends == [4, 8, 9, 10, 11, 12, 16, 20, 21, 22]
  assert_same_run(workdir, reference)
  steps = lambda folder: [r['step'] for r in read_log(folder) if r['split'] == 'train']
  assert steps(reference) == [4, 8, 10, 11, 12, 16, 20, 22]
  assert steps(workdir) == [4, 8, 9, 10, 11, 12, 16, 20, 22]


@pytest.mark.usefixtures('no_pictures')
def test_evaluations_need_not_follow_every_epoch(tmp_path, capsys):
  config = small_config(batch_size=32, epochs=3, evaluate_every_epochs=2, log_every_steps=100)
  loop.train(config, tmp_path, StopRequest())
  assert [(r['split'], r['step']) for r in read_log(tmp_path)] == [
    ('train', 11), ('train', 22), ('test', 22), ('train', 33), ('test', 33)
  ]  # fmt: skip
  assert checkpoints.Checkpoints(tmp_path).steps() == [33, 22]
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch ')]
  assert [line[:8] for line in lines] == ['epoch 1:', 'epoch 2:', 'epoch 3:']
  assert ['test loss' in line for line in lines] == [False, True, True]


@pytest.mark.usefixtures('no_pictures')
def test_a_stop_in_the_first_epoch_saves_at_once_and_says_so_where_it_is_loaded(stopped, tmp_path, monkeypatch, capsys):
  workdir, printed = stopped
  assert 'compiling the evaluation' not in printed
  assert not (workdir / 'curves.png').exists()
  classifier = googlenet_jax.load(workdir)
  assert classifier.steps == [6]
  assert f'note: step 6 in {workdir} was saved before the batch statistics' in capsys.readouterr().out
  # The checkpoint that predicts well is taken, although it is older.
  copied, stop = copy(workdir, tmp_path), StopRequest()
  loop.train(small_config(**CONFIG, max_steps=7), copied, stop)

  def signalled(*arguments):
    stop.signal = signal.SIGTERM
    return compile_train_step(*arguments)

  compile_train_step = loop.compile_train_step
  monkeypatch.setattr(loop, 'compile_train_step', signalled)
  loop.train(small_config(**CONFIG), copied, stop)
  saved = checkpoints.Checkpoints(copied, read_only=True)
  assert {step: saved.is_fresh(step) for step in saved.steps()} == {8: False, 7: True}
  capsys.readouterr()
  assert googlenet_jax.load(copied).steps == [7]
  assert 'note' not in capsys.readouterr().out


@pytest.mark.usefixtures('no_pictures')
def test_a_signal_that_comes_late_in_a_step_is_answered_after_the_next(whole, tmp_path, monkeypatch, capsys):
  stop, write = StopRequest(), MetricsLog.write

  def write_and_stop(self, record):
    write(self, record)
    stop.signal = signal.SIGTERM  # at the first log point, step 4, after the loop has looked

  monkeypatch.setattr(MetricsLog, 'write', write_and_stop)
  loop.train(small_config(**CONFIG), tmp_path, stop)
  assert checkpoints.Checkpoints(tmp_path).steps() == [5]  # in the fourth nothing was saved
  assert 'stopped at step 5 of 22, saved' in capsys.readouterr().out


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('when', ['fit_statistics', '_evaluate'])
def test_an_evaluation_that_a_signal_cut_short_is_made_by_the_same_command(
  when, whole, stopped, tmp_path, monkeypatch, capsys
):
  config, stop = small_config(**CONFIG, max_steps=11), StopRequest()
  with monkeypatch.context() as patch:
    do = getattr(evaluator.Evaluator, when)

    def signalled(self, state):
      stop.signal = signal.SIGHUP
      return do(self, state)

    patch.setattr(evaluator.Evaluator, when, signalled)
    loop.train(config, copy(stopped[0], tmp_path), stop)
  assert 'stopped at step 11 of 11, saved' in capsys.readouterr().out
  saved = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert (saved.steps()[0], saved.is_fresh(11)) == (11, when == '_evaluate')
  assert not (tmp_path / 'summary.json').exists()
  loop.train(config, tmp_path, StopRequest())
  assert 'compiling the training step' not in capsys.readouterr().out
  assert checkpoints.Checkpoints(tmp_path, read_only=True).is_fresh(11)  # saved anew
  assert json.loads((tmp_path / 'summary.json').read_text())['steps'] == 11
  ours, theirs = ([r['loss'] for r in read_log(f) if r['split'].startswith('test')] for f in (tmp_path, whole.workdir))
  assert ours == theirs[:2]


@pytest.mark.usefixtures('no_pictures')
def test_what_was_trained_is_saved_before_a_batch_that_cannot_be_had_ends_the_run(stopped, tmp_path, monkeypatch):
  batches = pipeline.train_batches

  def until_the_seventh(*arguments):
    yield from itertools.islice(batches(*arguments), 6)
    raise OSError(5, 'Input/output error', 'pictures/7.png')

  monkeypatch.setattr(pipeline, 'train_batches', until_the_seventh)
  with pytest.raises(UserError, match=r'^pictures/7.png: Input/output error\. Last good .*/6; the same command cont'):
    loop.train(small_config(**CONFIG), tmp_path, StopRequest())
  (step, state), (_, expected) = last_state(tmp_path), last_state(stopped[0])
  assert step == 6
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  without_speed = lambda records: [{**record, 'examples_per_second': 0} for record in records]
  assert without_speed(read_log(tmp_path)) == without_speed(read_log(stopped[0]))


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize(
  ('owner', 'name', 'error', 'said', 'step'),
  [
    (statistics, 'recompute', UserError('11 pictures cannot be read'), '11 pictures cannot be read', 11),
    (
      MetricsLog,
      'write',
      OSError(5, 'Input/output error', 'x/metrics.jsonl'),
      'x/metrics.jsonl: Input/output error',
      8,
    ),
  ],
)
def test_what_fails_before_a_save_fails_after_it(owner, name, error, said, step, stopped, tmp_path, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(owner, name, fail)
  with pytest.raises(UserError, match=f'^{said}. Last good checkpoint: .*/{step}; the same command continues there$'):
    loop.train(small_config(**CONFIG), copy(stopped[0], tmp_path), StopRequest())
  assert last_state(tmp_path)[0] == step


@pytest.mark.usefixtures('no_pictures')
def test_a_run_that_stops_early_has_ended_and_says_so(tmp_path, monkeypatch, capsys):
  digits = small_digits()
  dataset = dataclasses.replace(digits, validation=digits.test)
  monkeypatch.setattr(plan.Plan, 'epochs_without_better', lambda self, accuracies: len(accuracies))
  config = small_config(**CONFIG, early_stopping=1, **{'data.validation_examples': 104})
  for out in ('epoch 1: ', 'already ended at step 11; a larger --config.early_stopping would continue it'):
    loop.train(config, tmp_path, StopRequest(), dataset=dataset)
    printed = capsys.readouterr().out
    assert out in printed
    assert 'ended early: 1 epochs without a better validation accuracy' in printed
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert (summary['steps'], summary['epochs_without_better']) == (11, 1)
    assert runs.ended(config, tmp_path)
    (tmp_path / 'summary.json').unlink()  # killed before it was written
  assert [(r['step'], r['split']) for r in read_log(tmp_path)] == [
    (4, 'train'), (8, 'train'), (11, 'train'),
    (11, 'validation'), (11, 'validation_raw'), (11, 'test'), (11, 'test_raw'),
  ]  # fmt: skip
  with pytest.raises(UserError, match='config.early_stopping=1 needs validation images, and digits has none'):
    loop.train(config, tmp_path / 'other', StopRequest(), dataset=digits)


@pytest.mark.usefixtures('no_pictures')
def test_too_many_damaged_test_pictures_end_a_run_that_is_saved_and_continues(whole, tmp_path, capsys):
  digits = small_digits()

  class Images:  # decoded on demand; all but the first are damaged
    damaged, pace = True, splits.Pace()

    def fetch(self, indices):
      if self.damaged and indices.max() > 0:
        raise UserError('2 pictures cannot be read. Repair them, or allow more')
      return digits.test.images[indices], None

    def __getitem__(self, indices):
      return self.fetch(indices)[0]

  images = Images()
  dataset = dataclasses.replace(digits, test=splits.Split(images, digits.test.labels))
  train = functools.partial(loop.train, small_config(**CONFIG, max_steps=11), tmp_path, StopRequest(), None, dataset)
  with pytest.raises(UserError, match=r'allow more\. Last good .*/11; the same command continues there$'):
    train()
  assert checkpoints.Checkpoints(tmp_path, read_only=True).is_fresh(11)
  capsys.readouterr()
  images.damaged = False
  train()
  assert 'already ended at step 11' in capsys.readouterr().out
  ours, theirs = ([r['loss'] for r in read_log(f) if r['split'].startswith('test')] for f in (tmp_path, whole.workdir))
  assert ours == theirs[:2]


def test_another_recipe_in_the_same_workdir_is_refused(whole):
  with pytest.raises(UserError, match='learning_rate: 0.3 there, 0.5 now'):
    loop.train(small_config(**{**CONFIG, 'learning_rate': 0.5}), whole.workdir, StopRequest())


def test_a_longer_run_says_when_its_schedule_depends_on_the_length(stopped, tmp_path, monkeypatch, capsys):
  class BeginsError(Exception):
    """Everything of interest has been printed; training would only take time."""

  def begin(*_):
    raise BeginsError

  monkeypatch.setattr(loop, 'train_steps', begin)
  workdir = copy(stopped[0], tmp_path)
  for changes, note in (
    ({'max_steps': 7}, None),
    ({'max_steps': 8, 'epochs': 5}, 'note: the cosine schedule is now spread over 5 epochs instead of 2'),
  ):
    with pytest.raises(BeginsError):
      loop.train(small_config(**CONFIG | changes), workdir, StopRequest())
    out = capsys.readouterr().out
    assert 'continuing after step 6 of ' in out
    assert note in out if note else 'note:' not in out


def test_an_ended_run_given_again_adds_nothing(whole, tmp_path, capsys):
  copy(whole.workdir, tmp_path)
  (tmp_path / 'curves.png').unlink()
  loop.train(small_config(**CONFIG), tmp_path, StopRequest())
  assert read_log(tmp_path) == read_log(whole.workdir)
  assert (tmp_path / 'summary.json').read_text() == (whole.workdir / 'summary.json').read_text()
  assert (tmp_path / 'curves.png').exists()
  out = capsys.readouterr().out
  assert 'already ended at step 22; more --config.epochs or --config.max_steps would continue it' in out
  assert 'compiling the training step' not in out
  assert 'continuing' not in out


# What a run shows ----------------------------------------------------------------------------------------------------


def test_batch_statistics_fit_the_weights_from_the_first_epoch_on(whole):
  losses = {(r['step'], r['split']): r['loss'] for r in read_log(whole.workdir) if r['split'] != 'train'}
  assert set(losses) == {(11, 'test'), (11, 'test_raw'), (22, 'test'), (22, 'test_raw')}
  # With the running statistics of the training step: 91 and 82 after the first epoch, 8.7 and 4.8 after the second.
  assert max(losses.values()) < 2.5


def test_the_picture_of_a_batch_is_what_the_first_step_sees(whole):
  ((stored, seen, names, path, *_),) = whole.drawn
  config, split, mesh = small_config(**CONFIG), small_digits().train, sharding.make_mesh()
  seed = random_keys.sampling_seed(config.seed, 1)
  assert seed
  batch = jax.device_get(next(pipeline.train_batches(split, config.batch_size, seed, 0, mesh)))
  keys = random_keys.example_keys(seed, jnp.int32(0), jnp.arange(config.batch_size))
  expected = augment.augment(batch['image'], keys, config.image_size, config.augment)
  assert path == whole.workdir / 'augmentations.png'
  assert path.exists()
  assert len(stored) == len(names) == len(seen) == 16
  np.testing.assert_array_equal(stored, batch['image'][:16])
  assert names == [str(label) for label in batch['label'][:16]]
  np.testing.assert_allclose(seen, expected[:16], atol=1e-5)


def test_evaluation_of_a_checkpoint_equals_the_summary(whole, tmp_path, capsys):
  config, workdir = small_config(**CONFIG), copy(whole.workdir, tmp_path)
  under_way = workdir / 'checkpoints' / '23.orbax-checkpoint-tmp'
  under_way.mkdir()
  table.evaluate_run(config, workdir, None, 'test', [1])
  under_way.rmdir()  # still there: it may belong to a training that works at the same time
  found = json.loads((workdir / 'evaluation.json').read_text())
  summary = json.loads((workdir / 'summary.json').read_text())
  assert found['accuracy'] == summary['test_accuracy']
  assert found['loss'] == pytest.approx(summary['test_loss'], rel=1e-6)
  assert (found['step'], found['split'], found['examples']) == (22, 'test', 104)
  confusion = np.array(found['confusion_matrix'])
  assert confusion.sum() == 104
  assert np.trace(confusion) / 104 == found['accuracy']
  assert found['per_class_accuracy']['3'] == confusion[3, 3] / confusion[3].sum()
  assert f'accuracy {found["accuracy"]:.4f}' in capsys.readouterr().out

  other = small_config(**CONFIG, weight_decay=0.1, clip_norm=1.0, nesterov=True)  # evaluation does not read them
  before = (workdir / 'evaluation.json').read_text()
  table.evaluate_run(other, workdir, 11, 'train', [1])
  found = json.loads((workdir / 'evaluation_train.json').read_text())
  assert (found['step'], found['examples']) == (11, 360)
  assert {'table_train.md', 'table_train.png', 'mistakes_train.csv'} <= {path.name for path in workdir.iterdir()}
  assert (workdir / 'evaluation.json').read_text() == before
  with pytest.raises(UserError, match=r'--output=.*run.json cannot be written: File exists'):
    table.evaluate_run(config, workdir, None, 'test', [1], workdir / 'run.json')
  with pytest.raises(UserError, match=r'no checkpoint of step 5 in .*: there are \[22, 11\]'):
    table.evaluate_run(config, workdir, 5, 'test')
  with pytest.raises(UserError, match='the recipe holds out no images'):
    table.evaluate_run(config, workdir, None, 'validation')
  with pytest.raises(UserError, match='no checkpoint in .* has a validation accuracy'):
    table.evaluate_run(config, workdir, 'best', 'test')
  with pytest.raises(UserError, match='nowhere is no folder: train first'):
    table.evaluate_run(config, workdir / 'nowhere', None, 'test')


def test_a_class_without_images_is_null_in_json(whole, tmp_path, monkeypatch, capsys):
  digits, workdir = small_digits(), copy(whole.workdir, tmp_path)
  keep = digits.test.labels != 3
  few = datasets.Split(digits.test.images[keep], digits.test.labels[keep])
  monkeypatch.setattr(datasets, 'load', lambda **_: dataclasses.replace(digits, test=few))
  loop.train(small_config(**CONFIG), workdir, StopRequest())  # it has ended, but draws its pictures again
  table.evaluate_run(small_config(**CONFIG), workdir, None, 'test', [1])
  text = (workdir / 'evaluation.json').read_text()
  assert 'NaN' not in text
  classes = json.loads(text)['per_class_accuracy']
  assert [name for name, accuracy in classes.items() if accuracy is None] == ['3']
  assert '  3     nan ' in capsys.readouterr().out


# Losses that are not finite ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rate_of_its_step(tmp_path):
  # One cycle climbs from 1/25 of its rate. Log points are further apart than the first steps.
  config = small_config(batch_size=32, schedule='one_cycle', learning_rate=1e30, epochs=1, log_every_steps=11)
  with pytest.raises(UserError, match=r'loss is not finite.*There is no checkpoint yet') as raised:
    loop.train(config, tmp_path, StopRequest())
  step, rate = re.search(r'step (\d+): .* rate of (\S+)\. Its batch', str(raised.value)).groups()
  schedule = optimizers.learning_rate_schedule(config, 11)
  assert int(step) < 11
  assert float(rate) == pytest.approx(float(schedule(int(step) - 1)), rel=1e-5)
  assert not (tmp_path / 'summary.json').exists()
