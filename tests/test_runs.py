import json
import shutil

import pytest
from helpers import small_config

from googlenet_jax import __version__, load, recipe, recipe_checks, runs
from googlenet_jax.host import cpu_cores
from googlenet_jax.host.errors import UserError

CLASSES = ('zero', 'one')


def written(folder, **changes):
  """A folder with a run of `small_config`."""
  folder.mkdir(parents=True, exist_ok=True)
  runs.write(folder, runs.Run(small_config(**changes), CLASSES, (8, 8, 1)))
  return folder


def with_checkpoint(folder, step=5):
  (folder / 'checkpoints' / str(step)).mkdir(parents=True)
  return folder


def change(folder, **values):
  """Changes `run.json`."""
  content = json.loads((folder / runs.FILE).read_text())
  (folder / runs.FILE).write_text(json.dumps(content | values))


# run.json ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_its_types(tmp_path):
  changes = {'learning_rate': 1.0, 'epochs': 3, 'model.norm': 'batch', 'augment.flip': True, 'name': 'Ä'}
  found = runs.read(written(tmp_path, **changes))
  expected = small_config(**changes)
  assert found.config == expected
  assert recipe.flatten(found.config) == recipe.flatten(expected)
  types = {name: type(value) for name, value in recipe.flatten(found.config).items()}
  assert types == {name: type(key.default) for name, key in recipe.KEYS.items()}
  assert (found.classes, found.image_shape) == (CLASSES, (8, 8, 1))
  recipe_checks.validate(found.config)


def test_a_person_can_read_the_file(tmp_path):
  content = json.loads((written(tmp_path, image_size=32) / runs.FILE).read_text())
  assert list(content) == ['recipe', 'classes', 'image_shape', 'preparation', 'versions', 'machine']
  assert content['recipe']['image_size'] == 32
  assert content['recipe']['model']['norm'] == 'none'
  assert content['classes'] == ['zero', 'one']
  assert set(content['versions']) == {'googlenet_jax', 'python', 'jax', 'flax', 'optax', 'orbax-checkpoint'}
  assert content['versions']['googlenet_jax'] == __version__


def test_a_run_that_continues_on_another_machine_says_so(tmp_path, mesh_of):
  written(tmp_path)
  assert runs.other_machine(runs.read(tmp_path).machine, runs.machine(mesh_of(1))) == ''  # from before it was noted
  now = runs.machine(mesh_of(2))
  assert now == {'cpu_cores': cpu_cores.cores(), 'devices': 2, 'device': 'cpu'}
  change(tmp_path, machine={**now, 'cpu_cores': 96, 'devices': 1})
  before = runs.read(tmp_path).machine
  assert runs.other_machine(before, before) == ''
  assert runs.other_machine(before, now) == (
    f'note: cpu_cores 96 before, {now["cpu_cores"]} now; devices 1 before, 2 now: the run continues, but not bit for '
    'bit as without the interruption'
  )
  change(tmp_path, machine=5)
  with pytest.raises(UserError, match='damaged'):
    runs.read(tmp_path)


@pytest.mark.parametrize(
  ('channels', 'changes', 'text'),
  [
    (1, {}, 'grey, scaled to [0, 1]; the short side resized to 17 pixels {}; the middle 17x17 cut out'),
    (
      3,
      {'image_size': 224, 'augment.resize': 256 / 224},
      'RGB, scaled to [0, 1]; the short side resized to 256 pixels {}; the middle 224x224 cut out',
    ),
    (
      4,
      {'image_size': 32, 'augment.padding': 2},
      '4 channels, scaled to [0, 1]; the short side resized to 28 pixels {}; the middle 28x28 cut out, '
      '2 pixels of zeros on each side',
    ),
    (
      3,
      {'model.input_mean': '0.5', 'model.input_std': '0.2,0.3,0.4'},
      'RGB, scaled to [0, 1]; the short side resized to 17 pixels {}; the middle 17x17 cut out; the network normalises '
      'by mean 0.5 and standard deviation 0.2,0.3,0.4',
    ),
  ],
)
def test_the_preparation_of_images_in_words(channels, changes, text):
  found = runs.preparation(small_config(**changes), channels)
  assert found == text.format('(bilinear, antialiased when shrinking)')


def test_keys_that_are_missing_have_their_defaults(tmp_path):
  """So that a later version reads the runs of this one."""
  change(written(tmp_path), recipe={'seed': 3, 'model': {'norm': 'batch'}})
  config = runs.read(tmp_path).config
  default = recipe.flatten(recipe.default())
  assert recipe.flatten(config) == {**default, 'seed': 3, 'model.norm': 'batch'}


def test_runs_without_the_newer_keys_are_read_resumed_and_evaluated(tmp_path):
  """Keys of version 1.1 that older runs lack."""
  newer = {
    'warmup_epochs': 0.0,
    'augment.alternating_flip': False,
    'augment.cutmix': 0.0,
    'augment.mixup': 0.0,
  }
  folder = with_checkpoint(written(tmp_path, schedule='cosine'))
  old = {name: value for name, value in recipe.flatten(small_config(schedule='cosine')).items() if name not in newer}
  change(folder, recipe=recipe.from_flat(old).to_dict())
  config = runs.read(folder).config
  assert {name: recipe.flatten(config)[name] for name in newer} == newer
  recipe_checks.validate(config)
  runs.check_resumable(small_config(schedule='cosine'), folder)
  runs.check_agrees(config, folder)
  with pytest.raises(UserError, match='another recipe .warmup_epochs: 0.0 there, 2.0 now'):
    runs.check_resumable(small_config(schedule='cosine', warmup_epochs=2.0), folder)


def test_an_unknown_key_names_the_version_that_wrote_it(tmp_path):
  change(written(tmp_path), recipe={'seed': 3, 'model': {'wings': 2}}, versions={'googlenet_jax': '9.0'})
  with pytest.raises(UserError) as error:
    runs.read(tmp_path)
  assert str(error.value) == (
    f'{tmp_path}/run.json has the key model.wings, which version {__version__} lacks: version 9.0 wrote it'
  )
  change(tmp_path, versions={})
  with pytest.raises(UserError, match='version unknown wrote it'):
    runs.read(tmp_path)


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\xff\xfe\x00',
    b'{"recipe": {"seed": 0}',
    b'5',
    b'[]',
    b'{}',
    b'{"recipe": 5, "classes": [], "image_shape": []}',
    b'{"recipe": {}, "image_shape": [8, 8, 1]}',
    b'{"recipe": {}, "classes": null, "image_shape": [8, 8, 1]}',
    b'{"recipe": {"epochs": "many"}, "classes": ["a"], "image_shape": [8, 8, 1]}',
    b'{"recipe": {"epochs": 2.5}, "classes": ["a"], "image_shape": [8, 8, 1]}',
    b'{"recipe": {"model": 5}, "classes": ["a"], "image_shape": [8, 8, 1]}',
  ],
)
def test_a_damaged_file_is_one_line(content, tmp_path):
  (tmp_path / runs.FILE).write_bytes(content)
  with pytest.raises(UserError) as error:
    runs.read(tmp_path)
  told = str(error.value)
  assert told.startswith(f'{tmp_path}/run.json is damaged (') or 'has the key model, which' in told
  assert '\n' not in told


@pytest.mark.parametrize(
  ('values', 'why'),
  [
    ({'recipe': {'learning_rate': '0.1'}}, 'recipe.learning_rate must be a number'),
    ({'recipe': {'learning_rate': True}}, 'recipe.learning_rate must be a number'),
    ({'recipe': {'epochs': None}}, 'recipe.epochs must be a whole number'),
    ({'recipe': {'model': {'norm': 1}}}, 'recipe.model.norm must be text'),
    ({'recipe': 5}, 'recipe is no object'),
    ({'classes': None}, 'classes is no list'),
    ({}, 'the key recipe is missing'),
  ],
)
def test_a_mistake_of_a_hand_is_named(values, why, tmp_path):
  change(written(tmp_path), **values)
  if not values:
    (tmp_path / runs.FILE).write_text('{"classes": [], "image_shape": []}')
  with pytest.raises(UserError) as error:
    runs.read(tmp_path)
  again = 'bring it back from a copy, or give another --workdir'
  assert str(error.value) == f'{tmp_path}/run.json is damaged ({why}): {again}'


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
  (tmp_path / runs.FILE).mkdir()
  with pytest.raises(UserError, match=r'run.json cannot be read: Is a directory$'):
    runs.read(tmp_path)


# A folder without a run ----------------------------------------------------------------------------------------------


def told(folder):
  with pytest.raises(UserError) as error:
    runs.read(folder)
  return str(error.value)


def test_a_folder_without_a_run_is_described(tmp_path):
  folder = tmp_path / 'x'
  assert told(folder) == f'{folder} is no folder: train first, or give the --workdir of a run'
  folder.mkdir()
  assert told(folder) == f'{folder} holds no run (it is empty): train first, or give the --workdir of a run'
  (folder / 'b.txt').touch()
  (folder / 'a').mkdir()
  assert told(folder) == f'{folder} holds no run (it holds a/, b.txt): train first, or give the --workdir of a run'
  for number in range(10):
    (folder / f'c{number}').touch()
  assert '(it holds a/, b.txt, c0, c1, c2, c3 and 6 more)' in told(folder)
  assert told(folder / 'b.txt') == f'{folder}/b.txt is no folder: train first, or give the --workdir of a run'


def test_runs_in_its_folders_are_named(tmp_path):
  written(tmp_path / 'b')
  assert told(tmp_path) == f'{tmp_path} holds no run, but its folders do: give --workdir={tmp_path}/b'
  for name in 'ca':
    written(tmp_path / name)
  assert told(tmp_path) == f'{tmp_path} holds no run, but its folders do: give --workdir={tmp_path}/a (or b, c)'


def test_checkpoints_of_an_older_version_are_recognised(tmp_path):
  with_checkpoint(tmp_path)
  assert told(tmp_path) == (
    f'{tmp_path} has checkpoints but no run.json: bring it back from a copy; if an old version made them, train anew '
    'in another --workdir'
  )


# Resuming and evaluating ---------------------------------------------------------------------------------------------


def test_a_workdir_of_another_recipe_is_refused_with_the_keys(tmp_path):
  written(tmp_path)
  runs.check_resumable(small_config(learning_rate=0.5), tmp_path)  # no checkpoint yet: nothing to lose
  (tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir(parents=True)
  runs.check_resumable(small_config(learning_rate=0.5), tmp_path)  # the first save was killed
  with_checkpoint(tmp_path)
  runs.check_resumable(small_config(epochs=99, max_steps=3, log_every_steps=1, name='other'), tmp_path)
  with pytest.raises(UserError) as error:
    runs.check_resumable(small_config(**{'learning_rate': 0.5, 'model.norm': 'batch'}), tmp_path)
  assert str(error.value) == (
    f"{tmp_path} holds a run of another recipe (learning_rate: 0.01 there, 0.5 now; model.norm: 'none' there, 'batch' "
    'now): give another --workdir, or the same values'
  )
  runs.check_agrees(small_config(learning_rate=0.5), tmp_path)  # evaluation does not read it
  (tmp_path / 'checkpoints').rename(tmp_path / 'replaced')  # killed in `Checkpoints.replace`
  with pytest.raises(UserError, match='holds a run of another recipe'):
    runs.check_resumable(small_config(learning_rate=0.5), tmp_path)
  with pytest.raises(UserError, match='the only checkpoint of .* is being written anew'):
    load(tmp_path)


@pytest.mark.parametrize('content', [None, b'\xff\xfe\x00', b'{"seed": 0', b'5'])
def test_checkpoints_whose_recipe_cannot_be_read_are_not_continued(content, tmp_path):
  with_checkpoint(tmp_path)
  if content is not None:
    (tmp_path / runs.FILE).write_bytes(content)
  with pytest.raises(UserError, match='has checkpoints but no run.json' if content is None else 'run.json is damaged'):
    runs.check_resumable(small_config(seed=1), tmp_path)


@pytest.mark.parametrize('name', [name for name, key in recipe.KEYS.items() if key.scope == recipe.NETWORK])
def test_evaluation_refuses_what_changes_the_network_or_its_inputs(name, tmp_path):
  default = recipe.KEYS[name].default
  other = f'{default}x' if isinstance(default, str) else default + 1
  with pytest.raises(UserError) as error:
    runs.check_agrees(small_config(**{name: other}), written(tmp_path))
  here = recipe.flatten(small_config())[name]
  assert str(error.value) == (
    f'{tmp_path} holds a run of another recipe ({name}: {here!r} in the run, {other!r} given): leave --config and '
    'these keys out'
  )


def test_evaluation_may_change_everything_else(tmp_path):
  written(tmp_path)
  for name, key in recipe.KEYS.items():
    if key.scope != recipe.NETWORK:
      other = f'{key.default}x' if isinstance(key.default, str) else type(key.default)(1 - key.default)
      runs.check_agrees(small_config(**{name: other}), tmp_path)


def test_a_copied_run_is_the_same_run(tmp_path):
  shutil.copytree(written(tmp_path / 'a'), tmp_path / 'b')
  assert runs.read(tmp_path / 'b') == runs.read(tmp_path / 'a')


# Ensembles -----------------------------------------------------------------------------------------------------------


def ensemble(folder, numbers, **changes):
  for number in numbers:
    written(folder / f'member_{number}', **{'ensemble.member': number, **changes})
  return folder


def test_members_are_found_in_their_order(tmp_path):
  assert runs.members(tmp_path) == [tmp_path]
  ensemble(tmp_path, range(11), **{'ensemble.members': 11})
  written(tmp_path / 'member_best')
  (tmp_path / 'member_11').mkdir()  # nothing in it
  assert runs.members(tmp_path) == [tmp_path / f'member_{number}' for number in range(11)]


def test_a_missing_member_is_named(tmp_path):
  ensemble(tmp_path, (0, 2), **{'ensemble.members': 4})
  with pytest.raises(UserError) as error:
    runs.members(tmp_path)
  assert str(error.value) == (
    f'{tmp_path} is an ensemble of 4, and member_1 has not begun: train on with the same command, or give the '
    '--workdir of one member'
  )


def test_members_that_were_trained_apart_are_an_ensemble_of_those_that_are_there(tmp_path):
  ensemble(tmp_path, (1, 3))
  assert runs.members(tmp_path) == [tmp_path / 'member_1', tmp_path / 'member_3']


def test_an_ensemble_is_known_by_its_members(tmp_path):
  assert not runs.is_run(tmp_path)
  ensemble(tmp_path, (2, 1), **{'ensemble.members': 3, 'seed': 7})
  assert runs.is_run(tmp_path)
  assert runs.is_run(tmp_path / 'member_1')
  assert runs.recipe_of(tmp_path) == small_config(**{'ensemble.members': 3, 'seed': 7})
  # The folder of one member is a run of its own.
  assert runs.recipe_of(tmp_path / 'member_1') == small_config(**{'ensemble.member': 1, 'seed': 7})
  with pytest.raises(UserError, match='holds no run'):
    runs.recipe_of(tmp_path / 'member_1' / '..' / '..')


def test_evaluation_reads_the_recipe_of_an_ensemble_from_its_members(tmp_path):
  ensemble(tmp_path, range(2), **{'ensemble.members': 2})
  runs.check_agrees(small_config(batch_size=8), tmp_path)
  with pytest.raises(UserError, match='image_size: 17 in the run, 32 given'):
    runs.check_agrees(small_config(image_size=32), tmp_path)


def test_members_of_one_ensemble_were_trained_alike(tmp_path):
  folders = [tmp_path / str(member) for member in range(3)]
  for member, folder in enumerate(folders):
    written(folder, **{'ensemble.member': member, 'log_every_steps': member + 1, 'name': str(member)})
  runs.check_alike(folders)
  for changes, what in (
    ({'max_steps': 5}, 'max_steps: 0 there, 5 here'),
    ({'epochs': 5}, 'epochs: 10 there, 5 here'),
    ({'batch_size': 8}, 'batch_size: 16 there, 8 here'),
    ({'model.norm': 'batch'}, "model.norm: 'none' there, 'batch' here"),
  ):
    written(folders[2], **changes)
    with pytest.raises(UserError) as error:
      runs.check_alike(folders)
    assert str(error.value) == (
      f'{folders[0]} and {folders[2]} were trained by different recipes ({what}): they are not members of one ensemble'
    )


# The end of a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('summary', 'changes', 'expected'),
  [
    ({'steps': 50, 'epochs': 10.0}, {}, True),
    ({'steps': 50, 'epochs': 9.9}, {}, False),
    ({'steps': 50, 'epochs': 5.0}, {'max_steps': 50}, True),
    ({'steps': 50, 'epochs': 5.0}, {'max_steps': 51}, False),
    ({'steps': 60, 'epochs': 10.0}, {}, False),  # its checkpoint is gone
    ({'steps': 50, 'epochs': 5.0, 'epochs_without_better': 3}, {'early_stopping': 3}, True),
    ({'steps': 50, 'epochs': 5.0, 'epochs_without_better': 3}, {'early_stopping': 4}, False),
    ({'steps': 50, 'epochs': 5.0, 'epochs_without_better': 3}, {}, False),
    ({'steps': 50}, {}, False),
    ([], {}, False),
    (None, {}, False),
  ],
)
def test_a_run_has_ended_with_its_last_step_its_summary_and_its_checkpoint(summary, changes, expected, tmp_path):
  with_checkpoint(tmp_path, step=50)
  if summary is not None:
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
  assert runs.ended(small_config(**changes), tmp_path) is expected


def test_a_summary_cut_short_is_no_end(tmp_path):
  (with_checkpoint(tmp_path, step=50) / 'summary.json').write_text('{"steps": 50, "epochs": 10.0')
  assert not runs.ended(small_config(), tmp_path)
