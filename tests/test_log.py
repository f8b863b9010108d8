import json
import struct
import sys
import types

import pytest

from googlenet_jax.host import processes
from googlenet_jax.runs import RECORD
from googlenet_jax.training import log, tally
from googlenet_jax.training.log import MetricsLog


def record(step, split='train', **parts):
  numbers = {'epoch': step / 10, 'loss': 0.5, 'accuracy': 0.75, 'learning_rate': 0.01, 'examples_per_second': 100.0}
  return {'step': step, 'split': split, **numbers, **parts}


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def write(folder, first_step, *records):
  """Writes records as one run does; returns what the log held at its end."""
  log = MetricsLog(folder, first_step)
  for one in records:
    log.write(one)
  log.close()
  return log.records


def test_lines_that_are_no_records_are_dropped_from_the_log(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  good = [json.dumps(record(step)).encode() for step in (1, 2, 3)]
  damaged = [
    b'\xff\x00\xfe',
    b'{}',
    b'5',
    b'[]',
    b'null',
    b'{"step": 2}',
    json.dumps({**record(2), 'step': '2'}).encode(),
  ]
  path.write_bytes(b'\n'.join([good[0], *damaged, good[1], good[2], good[2][:20]]))
  records = write(tmp_path, 2, record(4))  # what came after step 2, the last checkpoint, will be done again
  assert lines(tmp_path) == records == [record(1), record(2), record(4)]


def test_the_log_is_never_half_written(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps(record(1)) + '\n')

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('pathlib.Path.replace', killed)
  with pytest.raises(KeyboardInterrupt):
    MetricsLog(tmp_path, 1)
  assert lines(tmp_path) == [record(1)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  log = MetricsLog(tmp_path, 0)
  log.write(record(1))
  assert lines(tmp_path) == [record(1)]
  log.write(record(2))
  assert lines(tmp_path) == [record(1), record(2)]
  log.close()


def test_a_run_from_the_first_step_begins_a_new_log(tmp_path):
  write(tmp_path, 0, record(1), record(2))
  assert write(tmp_path, 0, record(1)) == lines(tmp_path) == [record(1)]


def test_a_finished_run_that_is_started_again_adds_nothing(tmp_path):
  splits = [record(9, split) for split in ('train', 'validation', 'validation_raw', 'test', 'test_raw')]
  write(tmp_path, 0, record(8), *splits)
  assert write(tmp_path, 9, *splits[1:]) == lines(tmp_path) == [record(8), *splits]
  assert write(tmp_path, 9, record(10), record(10, 'test')) == [record(8), *splits, record(10), record(10, 'test')]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_index', 1)
  assert write(tmp_path, 0, record(1)) == [record(1)]  # its pictures would need them as well
  assert list(tmp_path.iterdir()) == []
  monkeypatch.setattr(processes, '_index', 0)
  write(tmp_path, 0, record(1), record(2))
  monkeypatch.setattr(processes, '_index', 1)
  assert MetricsLog(tmp_path, 1).records == [record(1)]  # all processes know what there is


def events(folder):
  """(tag, value, step) of every scalar, and the steps from which on what came before is void."""
  from tensorboardX.proto import event_pb2

  scalars, purged = [], []
  for path in sorted((folder / 'tensorboard').iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])  # behind the length stands its checksum
      content = content[16 + length :]
      scalars += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
      if event.session_log.status == event.session_log.START:
        purged.append(event.step)
  return scalars, purged


def test_tensorboard_gets_the_same_numbers(tmp_path):
  write(tmp_path, 0, record(1, loss_aux_4a=0.25, decoded_per_second=310.0), record(1, 'test'))
  scalars, purged = events(tmp_path)
  assert purged == [0]  # so is what a run wrote that ended before its first checkpoint
  assert scalars == [
    ('train/loss', 0.5, 1),
    ('train/accuracy', 0.75, 1),
    ('train/examples_per_second', 100.0, 1),
    ('train/loss_aux_4a', 0.25, 1),
    ('train/decoded_per_second', 310.0, 1),
    ('learning_rate', pytest.approx(0.01), 1),
    ('test/loss', 0.5, 1),
    ('test/accuracy', 0.75, 1),
    ('test/examples_per_second', 100.0, 1),
    ('learning_rate', pytest.approx(0.01), 1),
  ]
  write(tmp_path, 1, record(2))
  scalars, purged = events(tmp_path)
  assert purged[-1] == 2  # what an interrupted run wrote after step 1 is void
  assert ('train/loss', 0.5, 2) in scalars


def test_each_run_adds_a_file_of_events_that_comes_after_the_others(tmp_path, monkeypatch):
  for clock in (5000.0, 5000.5, 20.0):  # within a second, and set back
    monkeypatch.setattr(log.time, 'time', lambda clock=clock: clock)
    write(tmp_path, 1, record(2))
  names = sorted(path.name.split('.')[3] for path in (tmp_path / 'tensorboard').iterdir())
  assert names == ['0000005000', '0000005001', '0000005002']


def test_events_that_cannot_be_written_end_nothing(tmp_path, capsys):
  kept = MetricsLog(tmp_path, 0)
  kept.write(record(1))
  kept._events._file.close()
  kept._events._file = open('/dev/full', 'wb', buffering=0)  # noqa: SIM115
  records = [record(step) for step in range(1, 25)]  # tensorboardX would wait forever after ten
  for one in records[1:]:
    kept.write(one)
  kept.close()
  assert lines(tmp_path) == records
  assert capsys.readouterr().err == (
    f'warning: {tmp_path}/tensorboard was not written: No space left on device; the work goes on\n'
  )
  (tmp_path / 'new').mkdir()
  (tmp_path / 'new' / 'tensorboard').write_text('in the way')
  assert write(tmp_path / 'new', 0, *records) == lines(tmp_path / 'new') == records
  assert 'File exists' in capsys.readouterr().err


def test_a_rerun_that_adds_nothing_makes_no_file_of_events(tmp_path):
  write(tmp_path, 0, record(1))
  write(tmp_path, 1, record(1))
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def test_a_log_that_cannot_be_written_is_named(tmp_path):
  kept = MetricsLog(tmp_path, 0)
  kept._file.close()
  kept._file = open('/dev/full', 'a', buffering=1)  # noqa: SIM115
  with pytest.raises(OSError, match=f'No space left on device: .{tmp_path}/metrics.jsonl.$'):
    kept.write(record(1))
  kept.close()


def test_what_a_step_lacks_is_known(tmp_path):
  kept = MetricsLog(tmp_path, 0)
  kept.write(record(1, 'validation'))
  kept.write(record(2, 'test'))
  assert kept.has(1, ('validation',))
  assert not kept.has(1, ('validation', 'test'))
  kept.close()


def test_pytorch_is_not_imported_for_events(tmp_path, monkeypatch):
  for name in [name for name in sys.modules if name.split('.')[0] in ('tensorboardX', 'torch')]:
    monkeypatch.delitem(sys.modules, name)
  write(tmp_path, 0, record(1))
  assert 'tensorboardX' in sys.modules
  assert 'torch' not in sys.modules


def test_the_loop_makes_records_of_this_form():
  plan = types.SimpleNamespace(steps_per_epoch=4, learning_rate_fn=lambda step: 0.5**step)
  means = {'loss': 0.5, 'accuracy': 0.75, 'loss_total': 0.6, 'loss_aux_4a': 0.3}
  found = tally.make_record(plan, 3, 'train', means, 100.0)
  numbers = {'epoch': 0.75, 'loss': 0.5, 'accuracy': 0.75, 'learning_rate': 0.25, 'examples_per_second': 100.0}
  assert found == {'step': 3, 'split': 'train', **numbers, 'loss_total': 0.6, 'loss_aux_4a': 0.3}
  found = tally.make_record(plan, 4, 'test', {'loss': 0.5, 'accuracy': 0.75}, 100.0)
  assert {name: type(value) for name, value in found.items()} == RECORD
