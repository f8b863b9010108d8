"""Ensembles and the paper's table 3, on whole runs."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from helpers import draw_nothing, make_whole_runs_cheap, read_log, small_config, small_digits, take_devices

import googlenet_jax
from googlenet_jax import runs
from googlenet_jax.data import datasets, random_keys
from googlenet_jax.evaluation import drawing, table
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import program
from googlenet_jax.host.errors import UserError
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.training import ensemble, loop, state

CONFIG = {'batch_size': 32, 'max_steps': 5, 'ensemble.members': 3, 'ensemble.initial_weights': 'different'}


def answers(seed):
  """Random answers to 50 questions, in 10 classes."""
  rng = np.random.default_rng(seed)
  return Evaluation(np.arange(50) % 10, np.log(rng.dirichlet(np.ones(10), 50)))


def test_rows_of_the_table():
  members = [answers(seed) for seed in range(3)]
  base = table.row(members, 1, 1, None)
  assert (base['models'], base['crops'], base['cost'], base['top1_gain']) == (1, 1, 1, 0.0)
  assert base['top1_errors'] == [m.error() for m in members]
  assert base['top1_error'] == pytest.approx(np.mean([m.error() for m in members]))
  assert base['top5_error'] == pytest.approx(np.mean([m.error(5) for m in members]))
  together = table.row(members, 3, 144, base)
  mean = np.mean([np.exp(m.log_probabilities) for m in members], axis=0)
  order = np.argsort(-mean, axis=-1)
  labels = members[0].labels
  assert together['cost'] == 432
  assert together['top1_error'] == pytest.approx((order[:, 0] != labels).mean())
  assert together['top5_error'] == pytest.approx(1 - (order[:, :5] == labels[:, None]).any(-1).mean())
  assert together['top5_gain'] == pytest.approx(base['top5_error'] - together['top5_error'])


def test_the_table_as_text():
  columns = ('models', 'crops', 'cost', 'top1_error', 'top1_errors', 'top5_error', 'top1_gain', 'top5_gain')
  base = (1, 1, 1, 0.1, [0.09, 0.11], 0.02, 0.0, 0.0)
  more = (1, 10, 10, 0.09, [0.09, 0.09], 0.02, 0.01, -0.00001)
  most = (7, 144, 1008, 0.06, [0.06], 0.025, 0.04, -0.005)
  rows = [dict(zip(columns, row, strict=True)) for row in (base, more, most)]
  assert table.markdown(rows).splitlines()[2:] == [
    '| 1 | 1 | 1 | 10.00 % (9.00 to 11.00) | 2.00 % | base | base |',
    '| 1 | 10 | 10 | 9.00 % (9.00 to 9.00) | 2.00 % | +1.00 % | +0.00 % |',
    '| 7 | 144 | 1008 | 6.00 % | 2.50 % | +4.00 % | -0.50 % |',
  ]
  views = dict(zip(columns, (1, 6, 6, 0.09, [0.09], 0.02, 0.01, 0.0), strict=True))
  assert table.markdown([rows[0], views]).splitlines()[3:] == [
    '| 1 | 6 views | 6 | 9.00 % | 2.00 % | +1.00 % | +0.00 % |',
    '',
    '6 views: mirror and shifts of one pixel',
  ]


@pytest.mark.usefixtures('small_network')
def test_members_differ_in_their_order_only_or_in_their_weights_too(mesh_of):
  members = ensemble.members(small_config(**CONFIG | {'ensemble.initial_weights': 'same'}), pathlib.Path('w'))
  seeds = [random_keys.sampling_seed(config.seed, config.ensemble.member) for config, _ in members]
  assert len(set(seeds)) == 3
  assert seeds[0] == 0
  assert {state.initial_seed(config) for config, _ in members} == {0}
  different = ensemble.members(small_config(**CONFIG), members[0][1])
  assert [state.initial_seed(config) for config, _ in different] == seeds
  assert [str(folder) for _, folder in members] == ['w/member_0', 'w/member_1', 'w/member_2']
  configs = (members[0][0], members[1][0], different[1][0])
  states = [state.create_state(config, 10, 1, optax.identity(), mesh_of(1))[1] for config in configs]
  kernels = [np.asarray(one.params['conv2']['kernel']) for one in states]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[1], kernels[2])
  assert [int(one.seed) for one in states] == [seeds[0], seeds[1], seeds[1]]


# Whole ensembles -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def cheap():
  with pytest.MonkeyPatch.context() as patch:
    make_whole_runs_cheap(patch)
    yield


class StopWhen(StopRequest):
  """A request to stop that comes when a file is there, and perhaps only while steps are taken."""

  def __init__(self, path, in_steps):
    self.path, self.in_steps, self.came = path, in_steps, False
    super().__init__()

  @property
  def signal(self):
    self.came = self.came or (self.path.exists() and (self.is_held() or not self.in_steps))
    return signal.SIGTERM if self.came else None

  @signal.setter
  def signal(self, value):
    assert value in (None, signal.SIGTERM)  # the loop sets what it has read


@pytest.fixture(scope='module')
def trained(cheap, tmp_path_factory):
  """An ensemble of three: stopped when its first member ended, stopped in its second, continued; what it printed."""
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
    draw_nothing(patch)
    patch.setattr(program, 'is_program', lambda: True)
    workdir, config = tmp_path_factory.mktemp('ensemble'), small_config(**CONFIG)
    for awaited, in_steps, there, missing in (
      ('member_0/summary.json', False, 'member_0/checkpoints/5', 'member_1'),
      ('member_1/metrics.jsonl', True, 'member_1/checkpoints/1', 'member_2'),
    ):
      with pytest.raises(SystemExit) as stopped:
        ensemble.train_members(config, workdir, StopWhen(workdir / awaited, in_steps))
      assert stopped.value.code == 128 + signal.SIGTERM
      assert (workdir / there).exists()
      assert not (workdir / missing).exists()
      with pytest.raises(UserError, match=f'is an ensemble of 3, and {missing} has not begun: train on with the same'):
        runs.members(workdir)
    ensemble.train_members(config, workdir, StopRequest())
  return config, workdir, printed.getvalue()


def test_an_interrupted_ensemble_continues_where_it_stopped(trained, tmp_path, capsys):
  config, workdir, printed = trained
  assert 'stopped at step 1 of 5, saved' in printed
  assert printed.count('continuing after step 1 of 5') == 1
  assert printed.count('The same command continues: python ') == 2
  assert 'training 3 members in turn; times are per member' in printed
  for member in range(3):
    assert json.loads((workdir / f'member_{member}' / 'summary.json').read_text())['steps'] == 5
  losses = [read_log(workdir / f'member_{member}')[-1]['loss'] for member in range(3)]
  assert len(set(losses)) == 3
  # The member that was interrupted, in one piece.
  loop.train(ensemble.members(config, workdir)[1][0], tmp_path, StopRequest())
  whole, member = (json.loads((path / 'summary.json').read_text()) for path in (tmp_path, workdir / 'member_1'))
  assert (member['train_loss'], member['test_loss']) == (whole['train_loss'], whole['test_loss'])
  ensemble.train_members(config, workdir, StopRequest())
  assert capsys.readouterr().out.count('has ended') == 3


def test_a_member_without_its_checkpoint_or_with_a_damaged_summary_has_not_ended(trained, tmp_path):
  config, workdir, _ = trained
  own, folder = ensemble.members(config, workdir)[0]
  assert runs.ended(own, folder)
  (tmp_path / 'summary.json').write_text((folder / 'summary.json').read_text())
  assert not runs.ended(own, tmp_path)
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  assert runs.ended(own, tmp_path)
  own.max_steps = 6
  assert not runs.ended(own, tmp_path)
  (tmp_path / 'summary.json').write_text('[]')
  assert not runs.ended(own, tmp_path)


def test_the_table_of_an_ensemble(trained, capsys, monkeypatch):
  config, workdir, _ = trained
  digits = small_digits()
  few = datasets.Split(digits.test.images[:40], digits.test.labels[:40])
  monkeypatch.setattr(datasets, 'load', lambda **_: dataclasses.replace(digits, test=few))
  table.evaluate_run(config, workdir, None, 'test', [1, 6, 10])
  found = json.loads((workdir / 'evaluation.json').read_text())
  assert [(r['models'], r['crops'], r['cost']) for r in found['table']] == [
    (1, 1, 1), (1, 6, 6), (1, 10, 10), (3, 1, 3), (3, 6, 18), (3, 10, 30)
  ]  # fmt: skip
  assert found['accuracy'] == pytest.approx(1 - found['table'][3]['top1_error'])
  out = capsys.readouterr().out
  assert 'The rows for one model are the mean over the members' in out
  assert table.markdown(found['table']).splitlines()[5] in out
  assert table.markdown(found['table']) in (workdir / 'table.md').read_text()
  assert (workdir / 'table.png').stat().st_size > 10000
  monkeypatch.setattr(drawing, 'save', lambda *_: None)  # the pictures below are not looked at
  alone = []
  for member in range(3):  # each knows that it is a run by itself
    folder = workdir / f'member_{member}'
    table.evaluate_run(runs.read(folder).config, folder, None, 'test', [1])
    alone.append(1 - json.loads((folder / 'evaluation.json').read_text())['accuracy'])
  assert found['table'][0]['top1_errors'] == pytest.approx(alone)
  assert len(set(alone)) > 1
  with pytest.raises(UserError, match='is an ensemble: --step=N is for a single run'):
    table.evaluate_run(config, workdir, 5, 'test', [1])


def test_members_are_found_and_a_missing_one_is_named(trained, tmp_path):
  _, workdir, _ = trained
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  classifier = googlenet_jax.load(tmp_path)
  assert classifier.steps == [5, 5, 5]
  image = small_digits().test.images[0]
  probabilities = classifier.probabilities(image)
  alone = [googlenet_jax.load(tmp_path / f'member_{member}').probabilities(image) for member in range(3)]
  np.testing.assert_allclose(probabilities, np.mean(alone, axis=0), rtol=1e-5)
  shutil.rmtree(tmp_path / 'member_1')
  with pytest.raises(UserError, match='is an ensemble of 3, and member_1 has not begun'):
    googlenet_jax.load(tmp_path)


def test_side_by_side_members_train_as_in_turn(cheap, tmp_path, monkeypatch, capsys):
  take_devices(monkeypatch, 2)
  config = small_config(**CONFIG | {'ensemble.side_by_side': True, 'ensemble.members': 2, 'max_steps': 2})
  ensemble.train_members(config, tmp_path, StopRequest())
  out = capsys.readouterr().out
  assert 'training 2 members on 2 shares of 1 devices; lines begin with the member' in out
  assert {line[:3] for line in out.splitlines() if 'test acc' in line} == {'0: ', '1: '}
  own, _ = ensemble.members(config, tmp_path)[1]
  loop.train(own, tmp_path / 'alone', StopRequest(), jax.devices()[1:])
  found, expected = (json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('member_1', 'alone'))
  assert found['train_loss'] == expected['train_loss']
  assert found['test_loss'] == expected['test_loss']
  assert found['device_count'] == 1


# What ensembles refuse, without training -----------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch):
  """Trainings that only note their member and their devices; the second one fails."""
  begun = []

  def pretend(config, folder, stop, devices, dataset):
    begun.append((config.ensemble.member, devices and [device.id for device in devices]))
    if config.ensemble.member == 1:
      raise UserError('the loss is not finite')

  monkeypatch.setattr(loop, 'train', pretend)
  monkeypatch.setattr(jax, 'devices', jax.local_devices)  # all eight
  return begun


def write_ended_run(folder, config):
  """A folder that looks like a run that ended after 11 steps."""
  (folder / 'checkpoints' / '11').mkdir(parents=True)
  (folder / 'summary.json').write_text('{"steps": 11, "epochs": 1.0}')
  runs.write(folder, runs.Run(config, tuple('0123456789'), (8, 8, 1)))


def test_side_by_side_an_error_is_shown_and_the_other_members_continue(pretended, tmp_path, capsys):
  config = small_config(**CONFIG | {'ensemble.side_by_side': True, 'ensemble.members': 5})
  write_ended_run(tmp_path / 'member_0', ensemble.members(config, tmp_path)[0][0])
  with pytest.raises(UserError, match='training failed for members 1, see above; the same command continues with what'):
    ensemble.train_members(config, tmp_path, StopRequest())
  # Eight devices make five shares of one, although only four members are left.
  assert sorted(pretended) == [(1, [0]), (2, [1]), (3, [2]), (4, [3])]
  assert '1: error: the loss is not finite' in capsys.readouterr().out


def test_in_turn_an_error_ends_the_ensemble(pretended, tmp_path):
  with pytest.raises(UserError, match='the loss is not finite'):
    ensemble.train_members(small_config(**CONFIG), tmp_path, StopRequest())
  assert pretended == [(0, None), (1, None)]


def test_a_single_run_and_an_ensemble_do_not_share_a_workdir(pretended, tmp_path):
  (tmp_path / 'a' / 'member_0').mkdir(parents=True)
  with pytest.raises(UserError, match='a holds an ensemble, and config.ensemble.members=1 would train another kind'):
    ensemble.train_members(small_config(), tmp_path / 'a', StopRequest())
  (tmp_path / 'b' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='b holds a single run, and config.ensemble.members=3 would'):
    ensemble.train_members(small_config(**CONFIG), tmp_path / 'b', StopRequest())
  assert not pretended


def test_members_that_have_ended_with_another_length_are_refused(pretended, tmp_path):
  config = small_config(**CONFIG | {'max_steps': 11})
  write_ended_run(tmp_path / 'member_0', ensemble.members(config, tmp_path)[0][0])
  with pytest.raises(UserError, match='member_0 has ended as a run of another length .max_steps: 11 there, 5 now'):
    ensemble.train_members(small_config(**CONFIG), tmp_path, StopRequest())
  assert not pretended
