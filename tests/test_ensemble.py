"""Ensembles and the paper's table 3, on whole runs."""

import contextlib
import dataclasses
import io
import json
import pathlib
import signal

import jax
import numpy as np
import optax
import pytest
from helpers import read_log, small_config, small_table, take_two_devices

from googlenet_jax.data import datasets
from googlenet_jax.evaluation import table
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import checkpoints
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.training import ensemble, loop
from googlenet_jax.training.state import create_state

CONFIG = {'batch_size': 128, 'epochs': 1, 'learning_rate': 0.02, 'model.norm': 'batch', 'ensemble.members': 3}


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


@pytest.mark.usefixtures('small_network')
def test_members_differ_in_their_order_only_or_in_their_weights_too(mesh_of):
  runs = ensemble.members(small_config(**CONFIG), pathlib.Path('w'))
  seeds = [recipe.sampling_seed(recipe) for recipe, _ in runs]
  assert len(set(seeds)) == 3
  assert seeds[0] == 0
  assert {recipe.initial_seed(recipe) for recipe, _ in runs} == {0}
  different = ensemble.members(small_config(**CONFIG, **{'ensemble.initial_weights': 'different'}), runs[0][1])
  assert [recipe.initial_seed(recipe) for recipe, _ in different] == seeds
  assert [str(folder) for _, folder in runs] == ['w/member_0', 'w/member_1', 'w/member_2']
  recipes = (runs[0][0], runs[1][0], different[1][0])
  states = [create_state(recipe, 10, 1, optax.identity(), mesh_of(1))[1] for recipe in recipes]
  kernels = [np.asarray(state.params['conv2']['kernel']) for state in states]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[1], kernels[2])
  assert [int(state.seed) for state in states] == [seeds[0], seeds[1], seeds[1]]


class StopWhen:
  """A request to stop that comes when a file is there."""

  def __init__(self, path):
    self.path = path

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  @property
  def signal(self):
    return signal.SIGTERM if self.path.exists() else None

  def exit(self):
    raise SystemExit(128 + self.signal)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """An ensemble of three that was stopped when its first member ended and in its second, and went on; its lines."""
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
    patch.setattr(googlenet, 'TABLE', small_table())
    take_two_devices(patch)
    workdir = tmp_path_factory.mktemp('ensemble')
    config = small_config(**CONFIG)
    for awaited, there, missing in (
      ('member_0/confusion.png', 'member_0/summary.json', 'member_1'),
      ('member_1/metrics.jsonl', 'member_1/checkpoints/1', 'member_2'),
    ):
      with patch.context() as stopping:
        stopping.setattr(ensemble, 'StopRequest', lambda path=workdir / awaited: StopWhen(path))
        with pytest.raises(SystemExit) as stopped:
          ensemble.train_members(config, workdir)
      assert stopped.value.code == 128 + signal.SIGTERM
      assert (workdir / there).exists()
      assert not (workdir / missing).exists()
    ensemble.train_members(config, workdir)
  return config, workdir, printed.getvalue()


@pytest.mark.usefixtures('small_network')
def test_an_interrupted_ensemble_goes_on_where_it_stopped(trained, tmp_path, capsys, monkeypatch):
  config, workdir, printed = trained
  assert 'stopped at step 1 of 11, saved' in printed
  assert printed.count('continuing after step 1 of 11') == 1
  for member in range(3):
    assert json.loads((workdir / f'member_{member}' / 'summary.json').read_text())['steps'] == 11
  losses = [read_log(workdir / f'member_{member}')[0]['loss'] for member in range(3)]
  assert len(set(losses)) == 3
  take_two_devices(monkeypatch)
  loop.train(ensemble.members(config, workdir)[1][0], tmp_path)  # the member that was interrupted, in one piece
  whole, member = (json.loads((path / 'summary.json').read_text()) for path in (tmp_path, workdir / 'member_1'))
  assert (member['train_loss'], member['test_loss']) == (whole['train_loss'], whole['test_loss'])
  ensemble.train_members(config, workdir)
  assert capsys.readouterr().out.count('has ended') == 3


def test_a_member_without_its_checkpoint_or_with_a_damaged_summary_has_not_ended(trained, tmp_path):
  config, workdir, _ = trained
  recipe, folder = ensemble.members(config, workdir)[0]
  assert ensemble.ended(recipe, folder)
  (tmp_path / 'summary.json').write_text((folder / 'summary.json').read_text())
  assert not ensemble.ended(recipe, tmp_path)
  (tmp_path / 'checkpoints' / '11').mkdir(parents=True)
  assert ensemble.ended(recipe, tmp_path)
  recipe.epochs = 2
  assert not ensemble.ended(recipe, tmp_path)
  (tmp_path / 'summary.json').write_text('[]')
  assert not ensemble.ended(recipe, tmp_path)


@pytest.mark.usefixtures('small_network')
def test_the_table_of_an_ensemble(trained, capsys, monkeypatch):
  config, workdir, _ = trained
  digits = datasets.load('digits')
  few = datasets.Split(digits.test.images[:40], digits.test.labels[:40])
  monkeypatch.setattr(datasets, 'load', lambda **_: dataclasses.replace(digits, test=few))
  table.evaluate_checkpoint(config, workdir, None, 'test', [1, 10, 144])
  found = json.loads((workdir / 'evaluation.json').read_text())
  assert [(r['models'], r['crops'], r['cost']) for r in found['table']] == [
    (1, 1, 1), (1, 10, 10), (1, 144, 144), (3, 1, 3), (3, 10, 30), (3, 144, 432)
  ]  # fmt: skip
  assert found['accuracy'] == pytest.approx(1 - found['table'][3]['top1_error'])
  alone = []
  for member in range(3):
    recipe = small_config(**CONFIG | {'ensemble.members': 1, 'ensemble.member': member})
    folder = workdir / f'member_{member}'
    table.evaluate_checkpoint(recipe, folder, None, 'test', [1])
    alone.append(1 - json.loads((folder / 'evaluation.json').read_text())['accuracy'])
  assert found['table'][0]['top1_errors'] == pytest.approx(alone)
  assert len(set(alone)) > 1
  assert (workdir / 'table.png').stat().st_size > 10000
  assert table.markdown(found['table']).splitlines()[5] in capsys.readouterr().out
  assert table.markdown(found['table']) in (workdir / 'table.md').read_text()
  with pytest.raises(UserError, match='--step is for a single run'):
    table.evaluate_checkpoint(config, workdir, 5, 'test', [1])
  more = small_config(**{**CONFIG, 'ensemble.members': 4})
  with pytest.raises(UserError, match='member_3 holds no checkpoints'):
    table.evaluate_checkpoint(more, workdir, None, 'test', [1])


@pytest.mark.usefixtures('small_network')
def test_side_by_side_members_train_as_one_after_another(tmp_path, capsys, monkeypatch):
  take_two_devices(monkeypatch)
  config = small_config(**CONFIG | {'ensemble.side_by_side': True, 'ensemble.members': 2, 'max_steps': 2})
  ensemble.train_members(config, tmp_path)
  out = capsys.readouterr().out
  assert '2 members on 2 shares of the devices, of 1 each' in out
  assert {line[:3] for line in out.splitlines() if 'test acc' in line} == {'0: ', '1: '}
  recipe, _ = ensemble.members(config, tmp_path)[1]
  loop.train(recipe, tmp_path / 'alone', jax.devices()[1:])
  found, expected = (json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('member_1', 'alone'))
  assert found['train_loss'] == expected['train_loss']
  assert found['test_loss'] == expected['test_loss']
  assert found['device_count'] == 1


@pytest.fixture
def pretended(monkeypatch):
  """Trainings that only note their member and their devices; the second one fails."""
  begun = []

  def pretend(recipe, folder, devices, stop, dataset):
    begun.append((recipe.ensemble.member, devices and [device.id for device in devices]))
    if recipe.ensemble.member == 1:
      raise UserError('the loss is not finite')

  monkeypatch.setattr(loop, 'train', pretend)
  return begun


def test_side_by_side_an_error_is_told_and_the_other_members_go_on(pretended, tmp_path, capsys):
  config = small_config(**CONFIG | {'ensemble.side_by_side': True, 'ensemble.members': 5})
  (tmp_path / 'member_0' / 'checkpoints' / '11').mkdir(parents=True)
  (tmp_path / 'member_0' / 'summary.json').write_text('{"steps": 11, "epochs": 1.0}')
  checkpoints.write_json(tmp_path / 'member_0' / 'config.json', ensemble.members(config, tmp_path)[0][0].to_dict())
  with pytest.raises(UserError, match='of members 1 the training failed, see above; the same command goes on'):
    ensemble.train_members(config, tmp_path)
  # Eight devices make five shares of one, although only four members are left.
  assert sorted(pretended) == [(1, [0]), (2, [1]), (3, [2]), (4, [3])]
  assert '1: error: the loss is not finite' in capsys.readouterr().out


def test_one_after_another_an_error_ends_the_ensemble(pretended, tmp_path):
  with pytest.raises(UserError, match='the loss is not finite'):
    ensemble.train_members(small_config(**CONFIG), tmp_path)
  assert pretended == [(0, None), (1, None)]


def test_a_single_run_and_an_ensemble_do_not_share_a_workdir(pretended, tmp_path):
  (tmp_path / 'a' / 'member_0').mkdir(parents=True)
  with pytest.raises(UserError, match='a holds an ensemble, and config.ensemble.members=1 would train another kind'):
    ensemble.train_members(small_config(), tmp_path / 'a')
  (tmp_path / 'b' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='b holds a single run, and config.ensemble.members=3 would'):
    ensemble.train_members(small_config(**CONFIG), tmp_path / 'b')
  assert not pretended


def test_members_that_have_ended_with_another_length_are_refused(trained):
  _, workdir, _ = trained
  with pytest.raises(UserError, match='member_0 has ended as a run of another length .max_steps: 0 there, 5 now'):
    ensemble.train_members(small_config(**CONFIG, max_steps=5), workdir)
