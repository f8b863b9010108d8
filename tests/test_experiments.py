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

from experiments import (
  ablation,
  benchmark,
  benchmark_jax,
  benchmark_tables,
  choices,
  compare_sides,
  ensemble_table,
  hlo,
  run_main,
  worker,
)
from experiments.benchmark_tables import Case
from googlenet_jax.model import cpu_layers, layers

CASE = Case('training', 32, 100, 'float32')
RESULT = {
  'seconds': {'ours': [0.5, 0.5, 0.25], 'eager': [1.0, 2.0, 1.0], 'compiled': [4.0, 4.0, 4.0]},
  'multiply_adds': 100_000_000_000,
  'product': 800e9,
  'steps_per_epoch': None,
}


def test_rows_are_medians_and_ratios_those_of_one_turn():
  ours, eager, compiled = benchmark_tables.rows(CASE, RESULT, 'some CPU')
  assert ours['images_per_second'] == 200
  assert ours['ratio'] == 1
  assert eager['images_per_second'] == 100
  assert eager['first_quartile'] == 75
  assert eager['ratio'] == 4  # of 2, 4, 4; the ratio of the medians would be 2
  assert compiled['contender'] == 'compiled'
  assert compiled['epoch_seconds'] is None
  assert ours['gflops'] == pytest.approx(400)
  assert ours['share_of_product'] == pytest.approx(0.5)
  assert ours['share_of_peak'] is None


def test_share_of_the_published_peak():
  row = benchmark_tables.rows(CASE, RESULT, 'NVIDIA H200')[0]
  assert row['share_of_peak'] == pytest.approx(400e9 / 494.5e12)


def test_tables_leave_out_what_nobody_has_and_mark_what_is_missing():
  result = {**RESULT, 'seconds': {'ours': [0.5]}}
  by_case = {CASE: benchmark_tables.rows(CASE, result, 'some CPU')}
  text = benchmark_tables.comparison(by_case, ['eager'], ['eager', 'compiled'])
  assert text.splitlines()[-1] == '| training | 32 | 100 | float32 | 200 | - | - | - | - |'
  details = benchmark_tables.details(by_case)
  assert 'GFLOP/s' in details
  assert 'of the peak' not in details
  assert 's an epoch' not in details
  assert len(benchmark_tables.as_csv(by_case).splitlines()) == 2


def test_without_ours_there_is_no_ratio():
  result = {**RESULT, 'seconds': {'eager': [1.0]}, 'multiply_adds': None, 'product': None}
  (row,) = benchmark_tables.rows(CASE, result, 'some CPU')
  assert row['ratio'] is None
  assert row['gflops'] is None


def test_worker_answers_fails_in_a_line_and_goes_on(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
    f'import os, sys\nsys.path.insert(0, {str(worker.ROOT)!r})\n'
    'from experiments import worker\n'
    'def add(a, b):\n  print("noise")\n  return a + b\n'
    'def fail():\n  raise ValueError("CUDA out of memory:\\nmany lines")\n'
    'worker.serve({"add": add, "fail": fail, "die": lambda: os._exit(3)})\n'
  )
  child = worker.Worker(str(script), {})
  assert child.ask('add', a=1, b=2) == 3
  with pytest.raises(worker.WorkerError, match='^ValueError: CUDA out of memory:$') as error:
    child.ask('fail')
  assert error.value.memory
  assert child.ask('add', a=3, b=4) == 7
  for do in ('die', 'add'):  # it is dead the second time
    with pytest.raises(worker.WorkerError, match='ended with status 3'):
      child.ask(do)
  child.close()


def test_options_are_checked(capsys):
  assert benchmark.parse(['--contenders=ours,eager tuned']).contenders == ['ours', 'eager tuned']
  with pytest.raises(SystemExit):
    benchmark.parse(['--dtypes=float16'])
  assert "'float16' is none of: float32, bfloat16" in capsys.readouterr().err


def test_the_report_names_who_is_missing(tmp_path):
  machine = {'platform': 'cpu', 'device': 'some CPU', 'cores': 2, 'versions': {'jax': '1'}}
  results = {CASE: {**RESULT, 'errors': {'compiled': 'no C++ compiler'}, 'alone': False, 'products': {}}}
  benchmark.report(machine, results, benchmark.parse([f'--output={tmp_path}']))
  text = (tmp_path / 'benchmark_cpu.md').read_text()
  assert text.splitlines()[-1] == '- training, 32 px, batch 100, float32: compiled is missing: no C++ compiler'
  assert json.loads((tmp_path / 'benchmark_cpu.json').read_text())['cases'][0]['seconds'] == RESULT['seconds']


def test_instructions_have_kinds_and_sources():
  x, kernel3 = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))
  kernels, patched = [jnp.ones((8, 8)), jnp.ones((8, 4))], jnp.ones((3, 3, 8, 4))

  def loss(x, kernels, kernel3, patched):
    y, z = layers.pointwise(x, *kernels)
    small = layers.conv(layers.max_pool(y, 2)[:, :6, :6], patched)  # on a map of 6 pixels: a product
    return layers.conv(layers.max_pool(y, 1), kernel3).sum() ** 2 + (z**2).sum() + (small**2).sum()

  text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, kernels, kernel3, patched).compile().as_text()
  kinds = collections.Counter(hlo.kind(instruction, {kernel3.size}) for instruction in hlo.parse(text).values())
  for direction in ('forward', 'input gradient', 'kernel gradient'):
    assert kinds[f'1x1 product: {direction}'] == (2 if direction == 'forward' else 1)
    assert kinds[f'convolution, larger kernel: {direction}'] >= 2
  assert kinds['max-pool: forward'] >= 1
  assert kinds['max-pool: backward'] >= 1


@pytest.mark.parametrize(('size', 'factor', 'before'), [(28, 1, 0), (32, 1, 2), (61, 2, 2), (96, 3, 6), (224, 8, 0)])
def test_images_are_enlarged_by_a_whole_factor_and_padded(size, factor, before):
  images = np.random.default_rng(0).integers(1, 256, (2, 28, 28, 1), np.uint8)
  found = compare_sides.enlarged(images, size)
  assert found.shape == (2, size, size, 1)
  assert found.dtype == np.uint8
  inside = slice(before, before + 28 * factor)
  np.testing.assert_array_equal(found[:, inside, inside], np.kron(images, np.ones((1, factor, factor, 1), np.uint8)))
  assert found.sum(dtype=np.int64) == factor**2 * images.sum(dtype=np.int64)  # zeros outside


def test_contenders_that_do_not_fit_together_are_measured_alone(monkeypatch):
  def contest(case, names, machine, options):
    together = len(names) > 1
    seconds = {} if together or names == ['compiled'] else {names[0]: [1.0]}
    failed = names[-1:] if together or names == ['compiled'] else []
    errors = {name: worker.WorkerError('RESOURCE_EXHAUSTED: Out of memory') for name in failed}
    products = {name: [1e12] for name in seconds}
    product = 1e12 if seconds else None
    return {'seconds': seconds, 'errors': errors, 'multiply_adds': 7, 'product': product, 'products': products}

  monkeypatch.setattr(benchmark, 'contest', contest)
  result = benchmark.measure(CASE, ['ours', 'eager', 'compiled'], {}, None)
  assert result['alone']
  assert result['seconds'] == {'ours': [1.0], 'eager': [1.0]}
  assert result['errors'] == {'compiled': 'RESOURCE_EXHAUSTED: Out of memory'}


def test_variants_of_the_ablation_put_something_in_the_place_of_what_is_there():
  for variants in (ablation.ON_CPU, ablation.ELSEWHERE):
    for name, changes in variants.items():
      assert all(getattr(module, attribute) is not value for module, attribute, value in changes), name
      assert changes or name == ablation.SHIPPED or name in ablation.OPTIONS


@pytest.mark.usefixtures('small_network')
def test_the_ablation_times_other_programs_and_leaves_ours_as_it_was(monkeypatch):
  programs = []

  def timed_steps(step, state, batch, count):
    programs.append(step.as_text().count(' convolution('))
    return [1.0] * count, state

  monkeypatch.setattr(benchmark_jax, 'timed_steps', timed_steps)
  before = dict(vars(cpu_layers)), layers._cpu
  variants = {name: ablation.ON_CPU[name] for name in (ablation.SHIPPED, "XLA's own everywhere")}
  found = ablation.milliseconds(benchmark_jax.recipe(32, 2), variants, turns=1)
  assert found == dict.fromkeys(variants, [1000.0])
  ours, plain = programs[:2]
  assert ours < plain
  assert (dict(vars(cpu_layers)), layers._cpu) == before


SLOW_TO_SAVE = """
import pathlib, signal, sys, time
def save(number, frame):
  time.sleep(1)
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
  code = f'import pathlib; from experiments import run_main; run_main.ROOT = pathlib.Path({str(tmp_path)!r}); '
  command = [sys.executable, '-c', code + 'run_main.run_or_exit([])']
  process = subprocess.Popen(command, cwd=run_main.ROOT, start_new_session=True)
  while not (tmp_path / 'begun').exists() and process.poll() is None:
    time.sleep(0.05)
  time.sleep(0.2)  # its handlers follow the start of main.py at once
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
    (workdir / 'summary.json').write_text('{"steps": 7}')
    if 'mode' in flags:
      assert (flags['split'], flags['crops']) == ('validation', '1,10')
      error = 0.2 + 0.1 * int(flags['config.seed']) + 0.05 * (flags.get('config.augment.flip') == 'False')
      found = {'split': 'validation', 'step': 7, 'table': table(1, error, error / 2)}
      (workdir / 'evaluation.json').write_text(json.dumps(found))

  monkeypatch.setattr(choices, 'run_or_exit', pretend)
  monkeypatch.setattr(choices, 'ROOT', tmp_path)
  (tmp_path / 'configs').symlink_to(run_main.ROOT / 'configs')
  arguments = ['--epochs=3', '--seeds=2', '--crops=10,1', '--variants=as it is,no mirroring', '--set=dtype=float32']
  monkeypatch.setattr(sys, 'argv', ['choices.py', *arguments])
  choices.main()
  assert '--config.dtype=float32' in called[0]
  assert '--config.epochs=3' in called[0]
  text = (tmp_path / 'experiments' / 'results' / 'choices' / 'fashion_best_3_epochs.md').read_text()
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
      choices.parse()
    assert wrong.partition('=')[0] in capsys.readouterr().err


def test_the_table_of_an_ensemble_is_kept_with_its_command(tmp_path, monkeypatch, capsys):
  called = []

  def pretend(arguments):
    called.append(arguments)
    workdir = tmp_path / 'runs' / 'trial_ensemble'
    workdir.mkdir(parents=True, exist_ok=True)
    for file in ('table.md', 'table.png', 'evaluation.json'):
      (workdir / file).write_text(f'this is {file}\n')

  monkeypatch.setattr(ensemble_table, 'run_or_exit', pretend)
  monkeypatch.setattr(ensemble_table, 'ROOT', tmp_path)
  monkeypatch.setattr(sys, 'argv', ['ensemble_table.py', '--name=trial', '--config.epochs=1'])
  ensemble_table.main()
  common = ['--config=configs/fashion_best.py', '--config.epochs=1', '--config.ensemble.members=7']
  assert called == [[*common, '--workdir=runs/trial_ensemble', f'--mode={mode}'] for mode in ('train', 'evaluate')]
  results = tmp_path / 'experiments' / 'results' / 'ensemble' / 'trial'
  command = 'Written by `python experiments/ensemble_table.py --name=trial --config.epochs=1`.'
  assert (results / 'table.md').read_text() == f'{command}\n\nthis is table.md\n'
  assert {path.name for path in results.iterdir()} == {'table.md', 'table.png', 'evaluation.json'}
  monkeypatch.setattr(sys, 'argv', ['ensemble_table.py', '--workdir=x'])
  with pytest.raises(SystemExit, match='2'):
    ensemble_table.main()
  assert '--workdir=x: besides --config and --name only keys' in capsys.readouterr().err
