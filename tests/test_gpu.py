"""The measurements on a GPU: `experiments/gpu.py` and its stages."""

import json
import pathlib
import sys
import time

import pytest
from experiment_helpers import CASE, RESULT, FakeWorker, table

from experiments import gpu, gpu_stages, tables, worker
from experiments.tables import Case

GPU = {'platform': 'gpu', 'device': 'some GPU', 'versions': {'jax': '1', 'driver': '5'}}


def stage(name, measure, expected=1.0, limit=10.0, **arguments):
  return gpu.Stage(name, expected, limit, measure, arguments)


def test_a_stage_that_fails_or_does_not_fit_costs_only_itself():
  def good(machine, seconds, value):
    return {'value': value, 'seconds': seconds, 'notes': ['one form is missing']}

  def bad(machine, seconds):
    raise worker.WorkerError('CUDA error')

  records = []
  stages = [
    stage('a', bad),
    stage('b', good, value=1),
    stage('c', good, 60, value=2),
    stage('d', good, limit=99, value=3),
  ]
  gpu.run(stages, time.monotonic() + 50, GPU, records.append)
  assert [record['name'] for record in records] == list('abcd')
  assert [record['kind'] for record in records] == ['failed', 'good', 'skipped', 'good']
  assert records[0]['notes'] == ['WorkerError: CUDA error']
  assert records[1]['seconds'] == 10  # its own limit
  assert records[2]['notes'] == ['skipped: it takes about 60 s, and 50 s are left']
  assert 49 < records[3]['seconds'] <= 50  # what is left of the budget
  assert records[3]['device'] == 'some GPU'


def test_a_worker_is_killed_when_its_time_is_up(tmp_path):
  (tmp_path / 'side.py').write_text(
    'import time\nfrom experiments import worker\n'
    'class Side:\n'
    '  def wait(self):\n    print("compiling", flush=True)\n    time.sleep(60)\n'
    'worker.serve(Side())\n'
  )
  begin = time.monotonic()
  with worker.Worker('side', environment={'PYTHONPATH': str(tmp_path)}) as child:
    with pytest.raises(worker.WorkerError, match='^wait took longer than 2 s$'):
      child.ask('wait', seconds=2)
    assert 'compiling' in child.log()
  assert time.monotonic() - begin < 30


def test_forms_share_a_process_until_one_fails(monkeypatch):
  class Forms(FakeWorker):
    def ask(self, do, seconds=None, **arguments):
      assert seconds > 0
      if arguments.get('form') == 'latency hiding':
        raise worker.WorkerError('No such compile option')
      return super().ask(do, **arguments) if do != 'run' else 0.5

    def __init__(self, module, platform):
      super().__init__(module, platform, {})
      self.told.append((module, 'start'))

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.close()

  monkeypatch.setattr(gpu_stages, 'Worker', Forms)
  monkeypatch.setattr(Forms, 'told', [])
  found = gpu_stages.forms(GPU, 100, CASE, 'a recipe', ['no graphs', 'latency hiding', "XLA's layers"])
  assert [row['form'] for row in found['rows']] == ['ours', 'no graphs', "XLA's layers"]
  assert found['notes'] == [f'{CASE}: latency hiding is missing: No such compile option']
  assert sum(do == 'start' for _, do in Forms.told) == 2
  found = gpu_stages.forms(GPU, 0, CASE, 'a recipe', [])
  assert (found['kind'], found['notes']) == ('failed', [f'{CASE}: ours: no time left'])


def test_the_tables_of_a_gpu(tmp_path):
  case, best = Case('training', 32, 100, 'float32'), Case('training', 32, 50, 'bfloat16')
  row = lambda form, *seconds: {'form': form, 'seconds': seconds, 'start_seconds': 9.0, 'runs_on': '1 device'}
  measured = {
    'train-32': ('turns', {'case': case}, {'rows': tables.rows(CASE, RESULT), 'logs': {'eager': 'what it said'}}),
    'best': ('forms', {'case': best, 'config': 'b.py'}, {'rows': [row('ours', 0.1, 0.2, 0.1), row('no graphs', 0.2)]}),
    'product': ('products', {'dtypes': ['x']}, {'size': 8, 'products': {'JAX': {'x': 2.5e12}}}),
    'fashion': ('accuracy', {'config': 'configs/fashion.py'}, {'runs': []}),
    'profile-224': ('skipped', {}, {}),
  }
  records = [
    {'name': name, 'kind': kind, 'arguments': arguments, 'notes': ['no time'], 'commit': 'abc', **found}
    | {'device': 'some GPU', 'versions': {'jax': '1'}}
    for name, (kind, arguments, found) in measured.items()
  ]
  summary = lambda accuracy: {'summary': {'test_accuracy': accuracy, 'epochs': 2.0}, 'seconds': 50.0}
  records[3]['runs'] = [
    {'run': 'seed 0', **summary(0.9), 'views': {'1': {'6': 0.95}}},
    {'run': 'seed 1', **summary(0.8)},
  ]
  gpu.gpu_report.write(records, tmp_path)
  lines = (tmp_path / 'speed.md').read_text().splitlines()
  assert '- some GPU, jax 1, commit abc' in lines
  assert '| training | 32 | 100 | float32 | 200 (500 ms) | 100 (1e+03 ms) | 25 (4e+03 ms) | 4 |' in lines
  assert '| training, `b.py` | 32 | 50 | bfloat16 | 500 (100 ms) | - | - | - |' in lines
  assert '| no graphs | 250 | 200 | 200 to 200 | 2 | 1 device | 9 |' in lines
  assert lines[lines.index('| 8x8 matrix product, TFLOP/s | x |') + 2] == '| JAX | 2.5 |'
  assert '- profile-224: no time' in lines
  lines = (tmp_path / 'accuracy.md').read_text().splitlines()
  assert '| fashion | seed 0 | 0.9000 | 2 | 50 | 1 x 6: 0.9500 |' in lines
  assert '| fashion | mean of 2 | 0.8500 | - | 50 |  |' in lines
  assert 'what it said' in (tmp_path / 'log.txt').read_text()
  assert json.loads((tmp_path / 'results.json').read_text())[0]['name'] == 'train-32'
  assert not (tmp_path / 'profile.md').exists()


def test_earlier_results_can_be_joined(tmp_path, monkeypatch):
  for number, name in enumerate(('train-32', 'best')):
    record = {'name': name, 'kind': 'failed', 'arguments': {}, 'notes': [f'why {number}'], 'commit': '', 'versions': {}}
    (tmp_path / f'{number}.json').write_text(json.dumps([{**record, 'device': 'some GPU'}]))
  joined = [f'--join={tmp_path}/{number}.json' for number in range(2)]
  monkeypatch.setattr(sys, 'argv', ['gpu.py', '--stages=none', f'--output={tmp_path / "out"}', *joined])
  gpu.main()
  text = (tmp_path / 'out' / 'speed.md').read_text()
  assert '- best: why 1\n- train-32: why 0' in text


def test_stages_are_chosen_by_name_and_shrink(capsys):
  assert [stage.name for stage in gpu.parse(['--stages=fashion,train-224']).stages] == ['train-224', 'fashion']
  assert gpu.parse([]).stages == gpu.SPEED
  assert gpu.parse(['--tiny']).stages == gpu.STAGES
  assert len({stage.name for stage in gpu.STAGES}) == len(gpu.STAGES)
  for stage in map(gpu_stages.tiny, gpu.STAGES):
    assert stage.expected < 10
    assert 'case' not in stage.arguments or stage.arguments['case'].batch_size == 4
  with pytest.raises(SystemExit):
    gpu.parse(['--stages=nothing'])
  assert 'no nothing; choose from speed, accuracy, all, none, train-224' in capsys.readouterr().err


def test_as_many_members_as_fit_are_evaluated_together(tmp_path, monkeypatch):
  def pretend(arguments, seconds):
    flags = dict(argument[2:].split('=', 1) for argument in arguments)
    workdir = pathlib.Path(flags['workdir'])
    if 'mode' in flags:
      models = len(list(workdir.glob('member_*')))
      (workdir / 'evaluation.json').write_text(json.dumps({'table': table(1, 0.5, 0.4) + table(models, 0.3, 0.2)}))
      return
    assert flags['config.ensemble.members'] == '3'
    for number in range(2):
      folder = workdir / f'member_{number}'
      folder.mkdir(parents=True)
      (folder / 'run.json').write_text(json.dumps({'recipe': {'ensemble': {'members': 3}}}))
      if number < ended:
        (folder / 'summary.json').write_text(json.dumps({'test_accuracy': 0.5, 'train_seconds': 7.0}))

  monkeypatch.setattr(worker, 'run_main', pretend)
  monkeypatch.setattr(gpu_stages, 'ROOT', tmp_path)
  workdir = tmp_path / 'runs' / 'gpu' / 'best'
  ended = 2
  found = gpu_stages.ensemble(GPU, 100, 'configs/best.py', members=3, crops='1,10')
  assert [run['run'] for run in found['runs']] == ['member_0', 'member_1', '2 members together']
  assert found['runs'][-1]['views'] == {'1': {'1': 0.5, '10': 0.6}, '2': {'1': 0.7, '10': 0.8}}
  assert json.loads((workdir / 'member_1' / 'run.json').read_text())['recipe']['ensemble']['members'] == 2
  assert found['notes'][0].startswith('configs/best.py: 2 of 3 members ended in ')
  ended = 1
  found = gpu_stages.ensemble(GPU, 100, 'configs/best.py', members=3, crops='1,10')
  assert [run['run'] for run in found['runs']] == ['member_0']
  assert found['runs'][0]['views']['1'] == {'1': 0.5, '10': 0.6}
