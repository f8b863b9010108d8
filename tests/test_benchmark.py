"""Timing against PyTorch: `experiments/benchmark.py`, what it runs and what it writes."""

import contextlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_helpers import CASE, NAMES, RESULT, FakeWorker
from flax import nnx
from helpers import least_table

from experiments import benchmark, contest, gpu, gpu_stages, jax_side, tables, worker
from googlenet_jax import recipe
from googlenet_jax.model import googlenet, layers

MACHINE = {'platform': 'cpu', 'device': 'some CPU', 'versions': {'jax': '1'}, 'forms': ['no patches']}


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
  monkeypatch.setattr(googlenet, 'TABLE', least_table())
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
