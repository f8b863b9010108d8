"""The files in deploy/ and the commands of docs/scaling.md: their flags exist, and the scripts do what they say."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from absl import flags

import main
from googlenet_jax import recipe
from googlenet_jax.host import peers

ROOT = pathlib.Path(__file__).parent.parent
DEPLOY = ROOT / 'deploy'


def pod():
  """The pod of the JobSet, and the job around it."""
  (job,) = yaml.safe_load((DEPLOY / 'jobset.yaml').read_text())['spec']['replicatedJobs']
  job = job['template']['spec']
  return job, job['template']['spec']


def commands():
  """Arguments of main.py, from the container of the JobSet, the heads of the scripts, and docs/scaling.md."""
  (container,) = pod()[1]['containers']
  yield container['command'][2:]
  for path in (*DEPLOY.glob('*.sh'), ROOT / 'docs/scaling.md'):
    text = path.read_text().replace('\\\n', ' ') if path.exists() else ''
    for line in text.splitlines():
      # `#   sbatch deploy/slurm.sh ARGUMENTS` in a script, `    srun python main.py ARGUMENTS` in the page
      if found := re.match(r'(?:#   |    ).*?(?:slurm\.sh|tpu_pod\.sh|main\.py) (.+)', line):
        yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize('arguments', list(commands()), ids=' '.join)
def test_flags_exist(arguments):
  for argument in arguments:
    name, _, value = argument.lstrip('-').partition('=')
    if argument.startswith('--config.'):
      assert name.removeprefix('config.') in recipe.KEYS
    elif argument.startswith('--'):
      assert name in [flag.name for flag in flags.FLAGS.get_flags_for_module(main)]
    if name == 'config':
      assert (ROOT / value).exists()


def test_the_jobset_is_consistent():
  job, template = pod()
  (container,) = template['containers']
  environment = {variable['name']: variable.get('value') for variable in container['env']}
  assert environment['JAX_NUM_PROCESSES'] == str(job['parallelism']) == str(job['completions'])
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in template['volumes']}
  (size,) = [argument for argument in container['command'] if argument.startswith('--config.batch_size=')]
  assert int(size.partition('=')[2]) % (job['parallelism'] * container['resources']['limits']['nvidia.com/gpu']) == 0


def test_the_jobset_restarts_after_a_loss_and_not_after_a_mistake():
  policy = yaml.safe_load((DEPLOY / 'jobset.yaml').read_text())['spec']['failurePolicy']
  assert [(rule['action'], rule['onJobFailureReasons']) for rule in policy['rules']] == [
    ('FailJobSet', ['PodFailurePolicy'])
  ]
  (rule,) = pod()[0]['podFailurePolicy']['rules']
  assert rule == {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [1, 2]}}
  assert peers.LOST not in rule['onExitCodes']['values']


@pytest.mark.parametrize('path', sorted(DEPLOY.glob('*.sh')), ids=lambda path: path.name)
def test_scripts_are_bash_and_may_be_executed(path):
  subprocess.run(['bash', '-n', path], check=True)
  assert os.access(path, os.X_OK)


def run_with(folder, programs, script, *arguments, **variables):
  """Runs a script of deploy/ in which some programs are replaced by lines of bash."""
  for name, code in programs.items():
    path = folder / name
    path.write_text(f'#!/bin/bash\n{code}\n')
    path.chmod(0o755)
  environment = {'PATH': f'{folder}:{os.environ["PATH"]}', **variables}
  command = [shutil.which('bash'), str(DEPLOY / script), *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
  ('status', 'restarts', 'requeued'),
  [
    (0, None, False), (1, None, False), (2, None, False), (138, None, True), (138, 9, True), (143, 9, True),
    (75, None, True), (75, 2, True), (75, 3, False), (137, 2, True), (137, 3, False),
  ],
)  # fmt: skip
def test_a_slurm_job_is_requeued_after_it_has_saved_or_lost_a_process(tmp_path, status, restarts, requeued):
  programs = {'srun': f'printf "<%s>" "$@"; echo " $SRUN_CPUS_PER_TASK"; exit {status}', 'scontrol': 'echo "$@"'}
  variables = {'SLURM_JOB_ID': '7', 'SLURM_CPUS_PER_TASK': '32', 'PYTHON': 'my python', 'SECONDS': '60'}
  if restarts is not None:
    variables['SLURM_RESTART_COUNT'] = str(restarts)
  done = run_with(tmp_path, programs, 'slurm.sh', '--workdir=/a b', **variables)
  assert done.returncode == status
  assert done.stdout.startswith('<--wait=120><my python><main.py><--workdir=/a b> 32\n')
  assert ('requeue 7' in done.stdout) == requeued


def test_a_slurm_job_is_not_requeued_if_it_was_signalled_at_once(tmp_path):
  done = run_with(tmp_path, {'srun': 'exit 138', 'scontrol': 'echo "$@"'}, 'slurm.sh', SLURM_JOB_ID='7')
  assert (done.returncode, done.stdout) == (138, '')


def test_a_tpu_pod_gets_the_arguments_on_every_host(tmp_path):
  programs = {'gcloud': 'printf "%s\n" "$@"; echo'}
  arguments = ['--config=c.py', '--workdir=/a b']
  done = run_with(tmp_path, programs, 'tpu_pod.sh', 'slice', 'zone', '10.0.0.2:/share', *arguments)
  last = done.stdout.strip().split('\n\n')[-1]
  assert '\nslice\n--zone=zone\n--worker=all\n' in last
  assert shlex.split(last.splitlines()[-1])[-3:] == ['main.py', *arguments]
  assert run_with(tmp_path, programs, 'tpu_pod.sh', 'slice').returncode == 2
