import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, choices, jax_side, profile_step, tables, worker
from experiments.tables import Case
from googlenet_jax.model import layers

CASE = Case('training', 32, 100, 'float32')
NAMES = ('ours', 'eager', 'compiled')
MACHINE = {'platform': 'cpu', 'device': 'some CPU', 'versions': {'jax': '1'}, 'forms': ['no patches']}
RESULT = {
  'seconds': {'ours': [0.5, 0.5, 0.25], 'eager': [1.0, 2.0, 1.0], 'compiled': [4.0, 4.0, 4.0]},
  'multiply_adds': 100_000_000_000,
  'products': {'ours': [700e9, 900e9], 'eager': [600e9]},
  'made': {name: {'runs_on': '2 threads', 'start': 3.0} for name in NAMES},
  'memory': {name: (2**30, None) for name in NAMES},
  'errors': {},
  'alone': False,
}


# Tables ---------------------------------------------------------------------------------------------------------------


def test_rows_are_medians_and_ratios_compare_one_turn():
  ours, eager, compiled = tables.rows(CASE, RESULT)
  assert ours['images_per_second'] == 200
  assert ours['ratio'] == 1
  assert eager['images_per_second'] == 100
  assert eager['first_quartile'] == 75
  assert eager['ratio'] == 4  # the median of 2, 4, 4; the ratio of the medians would be 2
  assert compiled['contender'] == 'compiled'
  assert ours['gflops'] == pytest.approx(400)
  assert ours['share_of_product'] == pytest.approx(0.5)  # of the faster framework's median
  assert ours['runs_on'] == '2 threads'
  assert (ours['memory_mib'], ours['gpu_memory_mib']) == (1024, None)


def test_tables_leave_out_empty_columns_and_mark_what_is_missing():
  by_case = {CASE: tables.rows(CASE, {**RESULT, 'seconds': {'eager': [1.0]}})}
  assert tables.comparison(by_case).splitlines()[-1] == (
    '| training | 32 | 100 | float32 | - | 100 (eager) | - | 100 (eager) | - |'
  )
  details = tables.details(by_case)
  assert 'runs on' in details
  assert 'GFLOP/s' in details
  assert 'GPU' not in details
  assert len(tables.as_csv(by_case).splitlines()) == 2
  assert tables.comparison({CASE: tables.rows(CASE, {**RESULT, 'seconds': {'ours': [0.5]}})}) == ''


def test_without_ours_there_is_no_ratio():
  result = {**RESULT, 'seconds': {'eager': [1.0]}, 'multiply_adds': None, 'products': {}}
  (row,) = tables.rows(CASE, result)
  assert row['ratio'] is None
  assert row['gflops'] is None


def test_a_result_says_which_command_and_commit_wrote_it(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['/somewhere/experiments/benchmark.py', '--sizes=32', '--name=two words'])
  line = tables.written_by('jax')
  assert line.startswith("Written by `python -m experiments.benchmark --sizes=32 '--name=two words'` at commit ")
  assert line.endswith(f', jax {jax.__version__}.')


# Workers --------------------------------------------------------------------------------------------------------------


def test_a_worker_answers_fails_in_one_line_and_continues(tmp_path):
  (tmp_path / 'side.py').write_text(
    'import os, sys\nfrom experiments import worker\n'
    'class Side:\n'
    '  def add(self, a, b):\n    print("noise")\n    return a + b\n'
    '  def fail(self):\n    raise ValueError("CUDA out of memory:\\nmany lines")\n'
    '  def die(self):\n    os._exit(int(sys.argv[1]))\n'
    'worker.serve(Side())\n'
  )
  with worker.Worker('side', '3', environment={'PYTHONPATH': str(tmp_path)}) as child:
    assert child.ask('add', a=1, b=2) == 3
    with pytest.raises(worker.WorkerError, match='^ValueError: CUDA out of memory:$') as error:
      child.ask('fail')
    assert error.value.memory
    assert child.ask('add', a=3, b=4) == 7
    for do in ('die', 'add'):  # it is dead the second time
      with pytest.raises(worker.WorkerError, match='ended with status 3'):
        child.ask(do)


@pytest.mark.parametrize(('size', 'factor', 'before'), [(28, 1, 0), (32, 1, 2), (61, 2, 2), (96, 3, 6), (224, 8, 0)])
def test_images_are_enlarged_by_a_whole_factor_and_padded(size, factor, before):
  images = np.random.default_rng(0).integers(1, 256, (2, 28, 28, 1), np.uint8)
  found = worker.enlarged(images, size)
  assert found.shape == (2, size, size, 1)
  assert found.dtype == np.uint8
  inside = slice(before, before + 28 * factor)
  np.testing.assert_array_equal(found[:, inside, inside], np.kron(images, np.ones((1, factor, factor, 1), np.uint8)))
  assert found.sum(dtype=np.int64) == factor**2 * images.sum(dtype=np.int64)  # zeros outside


class CountingSide(worker.Side):
  """Steps return their number; a class is the label."""

  image_size = 32

  def __init__(self):
    self.batches, self.taken, self.waited = iter(range(100)), [], 0

  def step(self, batch):
    self.taken.append(batch)
    return len(self.taken)

  def put(self, images, labels):
    return labels

  def loss_of(self, result):
    return float(result)

  def predict(self, batch):
    return batch

  def wait(self):
    self.waited += 1


def test_both_sides_are_timed_trained_and_evaluated_by_the_same_code(tmp_path):
  side = CountingSide()
  assert side.run(steps=3, before=2) > 0
  assert side.taken == [0, 1, 2, 3, 4]
  assert side.waited == 2  # before the clock starts, and before it stops
  for split, count in (('train', 50), ('test', 300)):
    np.save(tmp_path / f'{split}_images.npy', np.zeros((count, 28, 28, 1), np.uint8))
    np.save(tmp_path / f'{split}_labels.npy', np.arange(count))
  np.save(tmp_path / 'order.npy', np.arange(40).reshape(10, 4))
  side.taken = []
  assert side.train(str(tmp_path), first=2, steps=3) == [1.0, 2.0, 3.0]
  np.testing.assert_array_equal(np.stack(side.taken), np.arange(8, 20).reshape(3, 4))
  assert side.evaluate(str(tmp_path)) == list(range(300))  # every image once


# benchmark.py ---------------------------------------------------------------------------------------------------------


def test_options_and_contenders_are_checked(capsys):
  options = benchmark.parse(['--contenders=ours,forms'])
  assert list(benchmark.chosen(options.contenders, MACHINE)) == ['ours', 'ours/no patches']
  assert {'ours', 'eager', 'compiled'} <= set(benchmark.chosen(None, MACHINE))
  assert not any(name.startswith('ours/') for name in benchmark.chosen(None, MACHINE))
  with pytest.raises(worker.WorkerError, match="no contender 'nobody': choose from forms; settings; ours; eager"):
    benchmark.chosen(['nobody'], MACHINE)
  assert benchmark.parse(['--config=configs/fashion_best.py']).contenders == ['ours']  # PyTorch has another network
  with pytest.raises(SystemExit):
    benchmark.parse(['--dtypes=float16'])
  assert "'float16' is none of: float32, bfloat16" in capsys.readouterr().err


def test_the_report_says_who_is_missing_and_keeps_every_block(tmp_path):
  results = {CASE: {**RESULT, 'errors': {'compiled': 'no C++ compiler'}}}
  benchmark.report(MACHINE, results, benchmark.parse([f'--output={tmp_path}']))
  text = (tmp_path / 'benchmark_cpu.md').read_text()
  assert text.splitlines()[-1] == '- training, 32 px, batch 100, float32: compiled is missing: no C++ compiler'
  assert '0.5 0.5 0.25' in (tmp_path / 'benchmark_cpu.csv').read_text()
  part = benchmark.parse([f'--output={tmp_path}', '--modes=training', '--contenders=ours,forms'])
  assert benchmark.report(MACHINE, results, part) == tmp_path / 'benchmark_cpu_training_ours_forms.md'


def test_contenders_that_do_not_fit_together_are_timed_alone(monkeypatch):
  def contest(case, entries, machine, options):
    names = list(entries)
    together = len(names) > 1
    seconds = {} if together or names == ['compiled'] else {names[0]: [1.0]}
    failed = names[-1:] if together or names == ['compiled'] else []
    errors = {name: worker.WorkerError('RESOURCE_EXHAUSTED: Out of memory') for name in failed}
    by_name = {'products': {name: [1e12] for name in seconds}, 'made': {}, 'memory': {}}
    return {'seconds': seconds, 'errors': errors, 'multiply_adds': 7, **by_name}

  monkeypatch.setattr(benchmark, 'contest', contest)
  result = benchmark.measure(CASE, dict.fromkeys(NAMES), {}, None)
  assert result['alone']
  assert result['seconds'] == {'ours': [1.0], 'eager': [1.0]}
  assert result['errors'] == {'compiled': 'RESOURCE_EXHAUSTED: Out of memory'}


class FakeWorker:
  """Takes a second a step; 'broken' fails in its second block."""

  log = []

  def __init__(self, module, platform, environment):
    self.name, self.blocks = module, 0

  def ask(self, do, **arguments):
    self.log.append((self.name, do))
    if do == 'run':
      self.blocks += arguments['steps'] == 8
      if self.name == 'broken' and self.blocks == 2:
        raise worker.WorkerError('broken')
      return 0.25
    made = {'multiply_adds': None, 'runs_on': '1 device'}
    return {'describe': {'versions': {}}, 'make': made, 'memory': (1, 2), 'product': 1e9}[do]

  def close(self):
    self.log.append((self.name, 'close'))


def test_contenders_take_turns_forwards_and_backwards(monkeypatch):
  monkeypatch.setattr(benchmark, 'Worker', FakeWorker)
  monkeypatch.setattr(FakeWorker, 'log', [])
  entries = {name: benchmark.Contender(name) for name in ('ours', 'broken', 'eager')}
  result = benchmark.contest(CASE, entries, MACHINE, benchmark.parse(['--repeats=3']))
  assert result['seconds'] == {'ours': [0.25] * 3, 'eager': [0.25] * 3}
  assert list(map(str, result['errors'].values())) == ['broken']
  assert result['memory'] == {'ours': (1, 2), 'eager': (1, 2)}
  products = [i for i, (_, do) in enumerate(FakeWorker.log) if do == 'product']
  turns = [name for name, do in FakeWorker.log[products[1] : products[2]] if do == 'run'][3:]  # 3 trials come first
  assert turns == ['ours', 'broken', 'eager', 'eager', 'broken', 'ours', 'ours', 'eager']
  assert sorted(name for name, do in FakeWorker.log if do == 'close') == ['broken', 'eager', 'ours']


def test_every_form_replaces_something():
  for name, (replacements, options) in jax_side.FORMS.items():
    assert all(getattr(module, attribute) is not value for module, attribute, value in replacements), name
    assert replacements or options, name


@pytest.mark.usefixtures('small_network')
def test_the_jax_side_trains_predicts_and_takes_other_forms(monkeypatch):
  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)  # this process has its devices already
  make_mesh = jax_side.sharding.make_mesh
  monkeypatch.setattr(jax_side.sharding, 'make_mesh', lambda _: make_mesh(jax.devices()[:1]))
  side, convolutions = jax_side.JaxSide(), []
  made = side.make('training', image_size=32, batch_size=2)
  assert made['runs_on'] == '1 device'
  assert made['multiply_adds'] > 0
  assert side.run(steps=1, before=0) > 0
  assert side.loss_of(side.step(next(side.batches))) == pytest.approx(np.log(10), abs=0.5)
  assert side.predict(next(side.batches)).shape == (2,)
  monkeypatch.setattr(layers, '_cpu', layers._cpu)  # restores after the test what the form replaces
  for form in (None, "XLA's layers"):
    side.make('inference', image_size=32, batch_size=2, form=form)
    convolutions.append(side.compiled.as_text().count(' convolution('))
  assert convolutions[0] < convolutions[1]


# profile_step.py ------------------------------------------------------------------------------------------------------


def test_instructions_have_kinds_and_origins():
  x, kernel3 = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))
  kernels, patched = [jnp.ones((8, 8)), jnp.ones((8, 4))], jnp.ones((3, 3, 8, 4))

  def loss(x, kernels, kernel3, patched):
    y, z = layers.pointwise(x, *kernels)
    small = layers.conv(layers.max_pool(y, 2)[:, :6, :6], patched)  # a product on a map of 6 pixels
    return layers.conv(layers.max_pool(y, 1), kernel3).sum() ** 2 + (z**2).sum() + (small**2).sum()

  text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, kernels, kernel3, patched).compile().as_text()
  instructions = profile_step.parse(text).values()
  kinds = collections.Counter(profile_step.kind(instruction, {kernel3.size}) for instruction in instructions)
  for direction in ('forward', 'input gradient', 'kernel gradient'):
    assert kinds[f'1x1 product: {direction}'] == (2 if direction == 'forward' else 1)
    assert kinds[f'convolution, larger kernel: {direction}'] >= 2
  assert kinds['max-pool: forward'] >= 1
  assert kinds['max-pool: backward'] >= 1
  assert any('layers.max_pool' in instruction.functions for instruction in instructions)


def test_calls_of_cudnn_are_convolutions():
  text = 'custom_call_target="__cudnn$conv{}"'
  make = lambda call: profile_step.Instruction('f32[7,7,1,64]', 'custom-call', 'jit(step)', (), text.format(call))
  kinds = [profile_step.kind(make(call), set()) for call in ('Forward', 'BackwardInput', 'BackwardFilter')]
  directions = ('forward', 'input gradient', 'kernel gradient')
  assert kinds == [f'convolution, larger kernel: {direction}' for direction in directions]


# Programs that train --------------------------------------------------------------------------------------------------

SLOW_TO_SAVE = """
import pathlib, signal, sys, time
def save(number, frame):
  time.sleep(0.5)
  pathlib.Path('saved').write_text(str(number))
  sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path('begun').touch()
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_waits_until_main_has_saved(tmp_path, number):
  (tmp_path / 'main.py').write_text(SLOW_TO_SAVE)
  code = f'import pathlib; from experiments import worker; worker.ROOT = pathlib.Path({str(tmp_path)!r}); '
  command = [sys.executable, '-c', code + 'worker.run_or_exit([])']
  process = subprocess.Popen(command, cwd=worker.ROOT, start_new_session=True)
  while not (tmp_path / 'begun').exists() and process.poll() is None:
    time.sleep(0.05)
  time.sleep(0.2)  # its handlers are set just after main.py starts
  if number == signal.SIGINT:
    os.killpg(process.pid, number)  # as a terminal does
  else:
    process.send_signal(number)
  assert process.wait(30) == 128 + number
  assert (tmp_path / 'saved').read_text() == str(int(number))


def table(models, *errors):
  return [{'models': models, 'crops': n, 'top1_error': e} for n, e in zip((1, 10), errors, strict=True)]


def test_choices_are_means_on_held_out_images(tmp_path, monkeypatch, capsys):
  called = []

  def pretend(arguments):
    called.append(arguments)
    flags = dict(argument[2:].split('=', 1) for argument in arguments)
    workdir = pathlib.Path(flags['workdir'])
    workdir.mkdir(parents=True, exist_ok=True)
    if 'mode' not in flags:
      summary = {'steps': 7, 'seed': int(flags['config.seed']), 'flip': flags.get('config.augment.flip')}
      (workdir / 'summary.json').write_text(json.dumps(summary))
      return
    assert (flags['split'], flags['crops']) == ('validation', '1,10')
    summary = json.loads((workdir / 'summary.json').read_text())
    error = 0.2 + 0.1 * summary['seed'] + 0.05 * (summary['flip'] == 'False')
    found = {'split': 'validation', 'step': 7, 'table': table(1, error, error / 2)}
    (workdir / 'evaluation.json').write_text(json.dumps(found))

  monkeypatch.setattr(choices, 'run_or_exit', pretend)
  monkeypatch.setattr(choices, 'ROOT', tmp_path)
  (tmp_path / 'configs').symlink_to(worker.ROOT / 'configs')
  arguments = ['--epochs=3', '--seeds=2', '--crops=10,1', '--variants=as it is,no mirroring', '--set=dtype=float32']
  monkeypatch.setattr(sys, 'argv', ['choices.py', *arguments, f'--output={tmp_path}'])
  choices.main()
  assert '--config.dtype=float32' in called[0]
  assert '--config.epochs=3' in called[0]
  text = (tmp_path / 'fashion_best_3_epochs.md').read_text()
  assert text.splitlines()[2:] == [
    '| variant | seeds | 1 crop | 10 crops |',
    '| --- | --- | --- | --- |',
    '| as it is | 2 | 0.7500 (0.7000 to 0.8000) | 0.8750 (0.8500 to 0.9000) |',
    '| no mirroring | 2 | 0.7000 (0.6500 to 0.7500) | 0.8500 (0.8250 to 0.8750) |',
  ]
  assert len(called) == 8
  choices.main()
  assert len(called) == 12  # nothing is evaluated again; main.py itself sees that the trainings have ended
  for wrong in ('--crops=7', '--variants=none', '--seeds=0', '--config=nowhere.py', '--config=configs/digits.py'):
    monkeypatch.setattr(sys, 'argv', ['choices.py', wrong])
    with pytest.raises(SystemExit, match='2'):
      choices.parse_arguments()
    assert wrong.partition('=')[0] in capsys.readouterr().err
