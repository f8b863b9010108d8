import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small_table

from experiments import (
  benchmark,
  choices,
  contest,
  finetune,
  gpu,
  gpu_stages,
  hlo,
  jax_side,
  profile_step,
  tables,
  worker,
)
from experiments.tables import Case
from googlenet_jax import recipe, recipe_checks
from googlenet_jax.model import googlenet, layers

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
  assert ours['share_of_product'] == pytest.approx(0.5)  # a share of the faster framework's median
  assert ours['runs_on'] == '2 threads'
  assert (ours['memory_mib'], ours['gpu_memory_mib']) == (1024, None)


def test_tables_leave_out_empty_columns_and_mark_what_is_missing():
  by_case = {CASE: tables.rows(CASE, {**RESULT, 'seconds': {'eager': [1.0]}})}
  assert tables.summary(by_case).splitlines()[-1] == '| training | 32 | 100 | float32 | 100 (1e+03 ms) | - |'
  details = tables.details(by_case)
  assert 'runs on' in details
  assert 'GFLOP/s' in details
  assert 'GPU' not in details
  assert len(tables.as_csv(by_case).splitlines()) == 2
  assert tables.summary({CASE: tables.rows(CASE, {**RESULT, 'seconds': {'ours': [0.5]}})}) == ''
  by_case = {
    CASE: [*tables.rows(CASE, RESULT), {'contender': 'eager/huge pages', 'images_per_second': 125, 'ratio': 3.0}]
  }
  head, _, line = tables.summary(by_case).splitlines()
  assert head.endswith('| ours | eager | compiled | eager/huge pages | ours / best stock PyTorch | ours / best |')
  assert line.endswith('| 200 (500 ms) | 100 (1e+03 ms) | 25 (4e+03 ms) | 125 (800 ms) | 4 | 3 |')


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
  def pretend(case, entries, machine, settings):
    names = list(entries)
    together = len(names) > 1
    seconds = {} if together or names == ['compiled'] else {names[0]: [1.0]}
    failed = names[-1:] if together or names == ['compiled'] else []
    errors = {name: worker.WorkerError('RESOURCE_EXHAUSTED: Out of memory') for name in failed}
    by_name = {'products': {name: [1e12] for name in seconds}, 'made': {}, 'memory': {}}
    return {'seconds': seconds, 'errors': errors, 'multiply_adds': 7, **by_name}

  monkeypatch.setattr(benchmark, 'contest', pretend)
  result = benchmark.measure(CASE, dict.fromkeys(NAMES), {}, benchmark.parse([]))
  assert result['alone']
  assert result['seconds'] == {'ours': [1.0], 'eager': [1.0]}
  assert result['errors'] == {'compiled': 'RESOURCE_EXHAUSTED: Out of memory'}


class FakeWorker:
  """Takes 0.25 s a step; 'broken' fails in its second block."""

  told = []

  def __init__(self, module, platform, environment):
    self.name, self.blocks = module, 0

  def ask(self, do, seconds=None, **arguments):
    self.told.append((self.name, do))
    if do == 'run':
      self.blocks += arguments['steps'] == 8
      if self.name == 'broken' and self.blocks == 2:
        raise worker.WorkerError('broken')
      return 0.25
    made = {'multiply_adds': None, 'runs_on': '1 device'}
    return {'describe': {'versions': {}}, 'make': made, 'memory': (1, 2), 'product': 1e9}[do]

  def close(self):
    self.told.append((self.name, 'close'))

  def log(self):
    return f'{self.name} says'


@pytest.mark.parametrize('together', [False, True])
def test_contenders_take_turns_forwards_and_backwards(monkeypatch, together):
  monkeypatch.setattr(contest, 'Worker', FakeWorker)
  monkeypatch.setattr(FakeWorker, 'told', [])
  entries = {name: contest.Contender(name) for name in ('ours', 'broken', 'eager')}
  settings = contest.Settings('', repeats=3, block_seconds=2.0, seconds=100, together=together)
  result = contest.contest(CASE, entries, MACHINE, settings)
  assert result['seconds'] == {'ours': [0.25] * 3, 'eager': [0.25] * 3}
  assert list(map(str, result['errors'].values())) == ['broken']
  assert result['logs'] == {'broken': 'broken says'}
  assert result['memory'] == {'ours': (1, 2), 'eager': (1, 2)}
  products = [i for i, (_, do) in enumerate(FakeWorker.told) if do == 'product']
  turns = [name for name, do in FakeWorker.told[products[1] : products[2]] if do == 'run'][3:]  # 3 trials come first
  assert turns == ['ours', 'broken', 'eager', 'eager', 'broken', 'ours', 'ours', 'eager']
  assert sorted(name for name, do in FakeWorker.told if do == 'close') == ['broken', 'eager', 'ours']


def test_every_form_changes_something():
  for name, form in (jax_side.CPU_FORMS | jax_side.GPU_FORMS).items():
    assert all(getattr(module, attribute) is not value for module, attribute, value in form.replace), name
    assert form.replace or form.keys or form.options, name
    assert set(form.keys) <= set(recipe.KEYS), name
  stages = [stage for stage in gpu.STAGES if stage.measure is gpu_stages.forms]
  assert {name for stage in stages for name in stage.arguments['names']} <= set(jax_side.GPU_FORMS)


def test_the_jax_side_trains_predicts_and_takes_other_forms(monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', {'inception_4a': small_table()['inception_4a']})
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
  for form in (None, "XLA's layers"):
    side.make('inference', image_size=32, batch_size=2, form=form)
    convolutions.append(side.compiled.as_text().count(' convolution('))
  assert convolutions[0] < convolutions[1]
  assert side.make('training', image_size=32, batch_size=2, form='10 steps a call')['runs_on'].endswith(
    '10 steps a call'
  )
  assert side.run(steps=15, before=0) > 0
  assert int(side.state.step) == 20  # whole calls


def test_every_form_of_a_layer_changes_the_program_for_a_gpu():
  rngs = nnx.Rngs(0)
  joined = [layers.Conv(8, 4, 1, norm='batch', rngs=rngs) for _ in range(2)]
  graphdef, params, rest = nnx.split(nnx.List([layers.Conv(1, 8, 7, 2, rngs=rngs), *joined]), nnx.Param, ...)

  def loss(params, x):
    first, *joined = nnx.merge(graphdef, params, rest, copy=True)
    return sum(y.sum() for y in layers.read_one_map(joined, layers.max_pool(first(x), 2), train=True))

  def program():
    jax.clear_caches()
    traced = jax.jit(jax.grad(loss)).trace(params, jnp.ones((2, 32, 32, 1)))
    return traced.lower(lowering_platforms=('cuda',)).as_text()

  ours = program()
  for name in gpu.LAYERS:
    with contextlib.ExitStack() as stack:
      for module, attribute, value in jax_side.GPU_FORMS[name].replace:
        stack.enter_context(mock.patch.object(module, attribute, value))
      assert program() != ours, name
  assert program() == ours


# hlo.py ------------------------------------------------------------------------------------------------------------


def test_instructions_have_kinds_and_origins():
  x, kernel3 = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))
  kernels, patched = [jnp.ones((8, 8)), jnp.ones((8, 4))], jnp.ones((3, 3, 8, 4))

  def loss(x, kernels, kernel3, patched):
    y, z = layers.pointwise(x, *kernels)
    small = layers.conv(layers.max_pool(y, 2)[:, :6, :6], patched)  # a product on a map of 6 pixels
    return layers.conv(layers.max_pool(y, 1), kernel3).sum() ** 2 + (z**2).sum() + (small**2).sum()

  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 10)  # conftest.py sets 0
  try:
    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, kernels, kernel3, patched).compile().as_text()
  finally:
    jax.config.update('jax_traceback_in_locations_limit', before)
  instructions = hlo.parse(text).values()
  kinds = collections.Counter(hlo.kind(instruction, {kernel3.size}) for instruction in instructions)
  for direction in ('forward', 'input gradient', 'kernel gradient'):
    assert kinds[f'1x1 product: {direction}'] == (2 if direction == 'forward' else 1)
    assert kinds[f'convolution, larger kernel: {direction}'] >= 1
  assert kinds['max-pool: forward'] >= 1
  assert kinds['max-pool: backward'] >= 1
  assert any('layers.max_pool' in instruction.functions for instruction in instructions)


def test_calls_of_cudnn_are_convolutions():
  text = 'custom_call_target="__cudnn$conv{}"'
  make = lambda call: hlo.Instruction('f32[7,7,1,64]', 'custom-call', 'jit(step)', (), text.format(call))
  kinds = [hlo.kind(make(call), set()) for call in ('Forward', 'BackwardInput', 'BackwardFilter')]
  directions = ('forward', 'input gradient', 'kernel gradient')
  assert kinds == [f'convolution, larger kernel: {direction}' for direction in directions]


def test_a_loop_counts_as_what_is_inside():
  def loop(x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0]

  instructions = hlo.parse(jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text())
  assert any(' dot(' in instruction.text for instruction in instructions.values())
  assert not any(instruction.op == 'while' for instruction in instructions.values())


def trace(**lines):
  """A trace of one GPU: events (kernel, instruction or None, nanoseconds) by name of the line."""
  simple = types.SimpleNamespace
  made = [
    simple(
      name=line.replace('_', ' '),
      events=[simple(name=k, stats=[('hlo_op', op)] if op else [], duration_ns=ns) for k, op, ns in events],
    )
    for line, events in lines.items()
  ]
  return simple(planes=[simple(name='/host:CPU', lines=made), simple(name='/device:GPU:0', lines=made)])


def test_the_trace_of_a_gpu_is_read_by_stream_and_instruction():
  text = """HloModule jit_step

FileNames
1 "/somewhere/googlenet_jax/model/gpu_layers.py"

FunctionNames
1 "max_pool"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main.1 (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %pool.2 = f32[4]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/transpose(jvp())/add" stack_frame_id=1}
  ROOT %conv.3 = f32[64]{0} custom-call(%pool.2), custom_call_target="__cudnn$convForward", window={size=1x1}
}
"""
  events = [('kernel_a', 'pool.2', 3_000_000), ('kernel_a', 'pool.2', 1_000_000), ('kernel_b', 'conv.3', 2_000_000)]
  data = trace(Stream_7=[*events, ('memcpy', None, 1_000_000)], XLA_Ops=events)
  found = hlo.profile(data, text, steps=2, kernel_sizes={64})
  assert found['dearest'][0] == ('pool.2', 2.0, 'max-pool: backward', 'gpu_layers.max_pool, backward', 'f32[4]')
  assert found['kinds'] == {'max-pool: backward': 2.0, '1x1 product: kernel gradient': 1.0, 'other': 0.5}
  assert found['launches'] == 2
  assert 'Ours: 4 ms and 2 instructions' in profile_step.jax_section({'wall': 4.0, **found})


# gpu.py ---------------------------------------------------------------------------------------------------------------

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


def test_a_training_is_told_to_save_when_its_time_is_up(tmp_path, monkeypatch):
  (tmp_path / 'main.py').write_text(SLOW_TO_SAVE)
  monkeypatch.setattr(worker, 'ROOT', tmp_path)
  monkeypatch.chdir(tmp_path)
  assert worker.run_main([], seconds=2) == 128 + signal.SIGTERM
  assert (tmp_path / 'saved').exists()


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


def test_fine_tuning_takes_ten_digits_of_each_class_and_tests_on_the_same_others():
  first, second = (finetune.few_digits(seed) for seed in (0, 1))
  assert (len(first.train), len(first.validation), len(first.test)) == (100, 400, 1000)
  assert np.bincount(second.train.labels).tolist() == [10] * 10
  np.testing.assert_array_equal(first.test.images, second.test.images)
  assert (first.train.images != second.train.images).any()
  held = {image.tobytes() for split in (first.validation, first.test) for image in split.images}
  assert not held & {image.tobytes() for image in first.train.images}
  for config in (finetune.source_recipe(4), finetune.target_recipe(60, 0.03, 1)):
    recipe_checks.validate(config)
