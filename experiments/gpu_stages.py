"""What a stage of gpu.py measures. Each function takes the machine and the seconds that it has, and returns figures."""

import contextlib
import json
import os
import pathlib
import shutil
import time
from typing import Any

from experiments import contest, profile_step, tables, worker
from experiments.contest import JAX, TORCH, Contender, Settings
from experiments.tables import OURS, Case
from experiments.worker import ROOT, TINY, Worker, WorkerError

BLOCKS, BLOCK_SECONDS = 5, 0.7
FORM_BLOCKS, FORM_SECONDS = 3, 80.0  # blocks of a form, and the limit for compiling it
STEPS = 10  # in a profile
LEAST = 8.0  # seconds in which a form may be measured, or a training started
TINY_SIZES = {224: 48, 96: 40, 32: 32}
TINY_BATCH = 4


def tiny(stage: Any) -> Any:
  """The same stage with small sizes, for a CPU."""
  arguments = dict(stage.arguments)
  if case := arguments.get('case'):
    # CPUs compute bfloat16 slowly.
    arguments['case'] = Case(case.mode, TINY_SIZES[case.image_size], TINY_BATCH, 'float32')
    arguments |= {'names': arguments['names'][:2]} if 'names' in arguments else {}
  if 'keys' in arguments or 'crops' in arguments:
    keys = ('epochs=1', 'max_steps=2', 'batch_size=32', 'log_every_steps=1')
    arguments |= {'config': 'configs/digits.py', 'keys': keys}
    arguments |= {'seeds': 1} if 'seeds' in arguments else {'members': 2} if 'members' in arguments else {}
  return stage._replace(expected=stage.expected / 30, arguments=arguments)


def turns(machine: dict[str, Any], seconds: float, case: Case, contenders: list[str]) -> dict[str, Any]:
  """Times ours and PyTorch in turns; contenders are 'eager' or modes of torch.compile."""
  modes = {name: {} if name == 'eager' else {'compile_mode': name} for name in contenders}
  entries = {OURS: Contender(JAX)} | {name: Contender(TORCH, {}, mode) for name, mode in modes.items()}
  timing = (2, 0.05) if os.environ.get(TINY) else (BLOCKS, BLOCK_SECONDS)
  product = 128 if os.environ.get(TINY) else None
  settings = Settings('configs/default.py', *timing, seconds=seconds, together=True, product=product)
  result = contest.contest(case, entries, machine, settings)
  notes = [f'{case}: {name} is missing: {error}' for name, error in result['errors'].items()]
  found = {'rows': tables.rows(case, result), 'products': result['products'], 'logs': result['logs'], 'notes': notes}
  return found if result['seconds'] else found | {'kind': 'failed'}


def forms(machine: dict[str, Any], seconds: float, case: Case, config: str, names: list[str]) -> dict[str, Any]:
  """Times ours, then other forms of it, in one process; after a failure a new process goes on.

  They are not timed in turns: compiling is fastest where XLA remembers in one process what it has tuned.
  """
  end, rows, notes, logs, left_over = time.monotonic() + seconds, [], [], {}, [None, *names]
  while left_over:
    with Worker(JAX, machine['platform']) as process:
      while left_over:
        name = left_over.pop(0)
        shown, left = name or OURS, end - time.monotonic()
        if left < LEAST:
          notes.append(f'{case}: {shown}: no time left')
          continue
        try:
          rows.append({'form': shown, **_form(process, min(left, FORM_SECONDS) if name else left, case, config, name)})
        except WorkerError as error:
          notes.append(f'{case}: {shown} is missing: {error}')
          logs[shown] = process.log()
          break
  return {'rows': rows, 'notes': notes, 'logs': logs} | ({} if rows else {'kind': 'failed'})


def _form(process: Worker, seconds: float, case: Case, config: str, name: str | None) -> dict[str, Any]:
  """Compiles and times one form."""
  blocks, length = (2, 0.05) if os.environ.get(TINY) else (FORM_BLOCKS, BLOCK_SECONDS)
  begin = time.monotonic()
  made = process.ask('make', seconds, form=name, config=config, **case._asdict())
  run = lambda steps: process.ask('run', 2 * LEAST, steps=steps)
  run(contest.WARM_UP)
  start, trial = time.monotonic() - begin, run(2)
  steps = max(1, min(contest.MAX_STEPS, round(length / trial)))
  return {'seconds': [run(steps) for _ in range(blocks)], 'start_seconds': start, 'runs_on': made['runs_on']}


def profile(machine: dict[str, Any], seconds: float, case: Case, **arguments) -> dict[str, Any]:
  """Profiles ours with a recipe `config`, or PyTorch with a `compile_mode`."""
  module, end = TORCH if 'compile_mode' in arguments else JAX, time.monotonic() + seconds
  return {'found': profile_step.measure(module, {}, case, STEPS, machine['platform'], end, **arguments)}


def products(machine: dict[str, Any], seconds: float, dtypes: list[str]) -> dict[str, Any]:
  """FLOP/s of a large matrix product, by framework and dtype; float32 is TF32 on a GPU."""
  end, found = time.monotonic() + seconds, {}
  size = 128 if os.environ.get(TINY) else contest.PRODUCT[machine['platform']]
  for framework, module in (('JAX', JAX), ('PyTorch', TORCH)):
    with Worker(module, machine['platform']) as process:
      ask = lambda dtype: process.ask('product', max(0.1, end - time.monotonic()), size=size, dtype=dtype, repeats=9)
      found[framework] = {dtype: ask(dtype) for dtype in dtypes}
  return {'size': size, 'products': found}


# Accuracy ------------------------------------------------------------------------------------------------------------


def accuracy(
  machine: dict[str, Any], seconds: float, config: str, keys: tuple[str, ...] = (), seeds: int = 1, crops: str = ''
) -> dict[str, Any]:
  """Trains a recipe with main.py, once for each seed that fits, and evaluates it with several crops or views."""
  end, runs, notes = time.monotonic() + seconds, [], []
  for seed in range(seeds):
    if (left := end - time.monotonic()) < LEAST:
      notes.append(f'{config}: no time left for seed {seed}')
      break
    workdir, taken = _train(config, f'_{seed}', (*keys, f'seed={seed}'), left)
    if (workdir / 'summary.json').exists():
      runs.append(_row(f'seed {seed}', workdir, taken, _evaluate(workdir, crops, end)))
    else:
      notes.append(f'{config}: seed {seed} did not end in {taken:.0f} s')
  return _trained(runs, notes)


def ensemble(
  machine: dict[str, Any], seconds: float, config: str, members: int, crops: str, keys: tuple[str, ...] = ()
) -> dict[str, Any]:
  """Trains as many members as fit, in turn, and evaluates them alone and together."""
  end, notes = time.monotonic() + seconds, []
  reserve = min(60.0, seconds / 5)  # for the evaluation
  workdir, taken = _train(config, '', (*keys, f'ensemble.members={members}'), seconds - reserve)
  begun = sorted(workdir.glob('member_*'))
  ended = [folder for folder in begun if (folder / 'summary.json').exists()]
  if len(ended) < members:
    notes.append(f'{config}: {len(ended)} of {members} members ended in {taken:.0f} s')
  runs = [
    _row(folder.name, folder, json.loads((folder / 'summary.json').read_text())['train_seconds']) for folder in ended
  ]
  if len(ended) > 1:
    for folder in begun:
      if folder in ended:
        _make_member_of(folder, len(ended))
      else:
        folder.rename(folder.with_name(f'unfinished_{folder.name}'))
    runs.append({'run': f'{len(ended)} members together', 'seconds': taken, 'views': _evaluate(workdir, crops, end)})
  elif ended:
    runs[0]['views'] = _evaluate(ended[0], crops, end)
  return _trained(runs, notes)


def _trained(runs, notes) -> dict[str, Any]:
  return {'runs': runs, 'notes': notes} | ({} if runs else {'kind': 'failed'})


def _train(config: str, suffix: str, keys: tuple[str, ...], seconds: float) -> tuple[pathlib.Path, float]:
  """Runs main.py in a new folder; returns the folder, and the seconds from the command to its end."""
  workdir, begin = ROOT / 'runs' / 'gpu' / f'{pathlib.Path(config).stem}{suffix}', time.monotonic()
  shutil.rmtree(workdir, ignore_errors=True)
  arguments = [f'--config={config}', f'--workdir={workdir}', *(f'--config.{key}' for key in keys)]
  worker.run_main(arguments, seconds=seconds)
  return workdir, time.monotonic() - begin


def _evaluate(workdir: pathlib.Path, crops: str, end: float) -> dict[str, dict[str, float]]:
  """Accuracy by number of models and number of crops; empty without crops or time."""
  left = end - time.monotonic()
  if not crops or left < LEAST:
    return {}
  worker.run_main(['--mode=evaluate', f'--workdir={workdir}', f'--crops={crops}'], seconds=left)
  views = {}
  with contextlib.suppress(OSError):  # it did not end in time
    for row in json.loads((workdir / 'evaluation.json').read_text())['table']:
      views.setdefault(str(row['models']), {})[str(row['crops'])] = 1 - row['top1_error']
  return views


def _row(name: str, workdir: pathlib.Path, seconds: float, views: dict[str, Any] | None = None) -> dict[str, Any]:
  return {'run': name, 'seconds': seconds, 'summary': json.loads((workdir / 'summary.json').read_text())} | (
    {'views': views} if views else {}
  )


def _make_member_of(folder: pathlib.Path, count: int) -> None:
  """Writes into a run that its ensemble has `count` members, because no others will be trained."""
  path = folder / 'run.json'
  run = json.loads(path.read_text())
  run['recipe']['ensemble']['members'] = count
  path.write_text(json.dumps(run, indent=2))
