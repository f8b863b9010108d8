"""Which process of how many this is, as the launcher of a cluster says.

| launcher | processes | number | where process 0 listens |
|---|---|---|---|
| Kubernetes | `JAX_NUM_PROCESSES` | `JAX_PROCESS_ID` or `JOB_COMPLETION_INDEX` | `JAX_COORDINATOR_ADDRESS` |
| Open MPI 4 | `OMPI_COMM_WORLD_SIZE` | `OMPI_COMM_WORLD_RANK` | host of mpirun, from `OMPI_MCA_orte_hnp_uri` |
| Open MPI 5 | `OMPI_COMM_WORLD_SIZE` | `OMPI_COMM_WORLD_RANK` | host of mpirun, from `PMIX_NAMESPACE` |
| MPICH, Intel MPI | `PMI_SIZE` | `PMI_RANK` | not said: `--coordinator` |
| Slurm (srun) | `SLURM_STEP_NUM_TASKS` | `SLURM_PROCID` | first host of `SLURM_STEP_NODELIST` |
| Cloud TPU | `TPU_WORKER_HOSTNAMES` | `TPU_WORKER_ID` | first of these hosts |

Kubeflow Trainer sets the three variables of JAX; in a JobSet, deploy/jobset.yaml does. Several slices of TPUs have
`MEGASCALE_NUM_SLICES`, `MEGASCALE_SLICE_ID` and `MEGASCALE_COORDINATOR_ADDRESS`. A TPU VM without these variables asks
Google's metadata server.
"""

import glob
import importlib.util
import re
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from googlenet_jax.host import errors

TPU_PORT = 8482  # JAX's own choice on TPUs
_FIRST_PORT = 61440  # above the ports that Linux gives to outgoing connections
_HINT = 'give --coordinator=HOST:PORT, --num_processes=N and --process_id=I'


class Place(NamedTuple):
  """The place of this process among all.

  Attributes:
    coordinator: `HOST:PORT`, where process 0 listens.
    count: number of processes, at least 2.
    index: number of this process, from 0.
    found: who said so, such as `Slurm`.
  """

  coordinator: str
  count: int
  index: int
  found: str

  @property
  def address(self) -> tuple[str, int]:
    """Host and port of the coordinator, as sockets take them: an IPv6 address has no brackets."""
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def find(environment: Mapping[str, str], coordinator: str | None = None) -> Place | None:
  """Returns the place of this process; None if it works alone.

  Args:
    environment: environment variables.
    coordinator: `HOST:PORT` of process 0, if the user gave it.

  Raises:
    UserError: a variable is missing or malformed, or the launcher does not say where process 0 is.
  """
  if 'JAX_NUM_PROCESSES' in environment:
    return _of_variables(environment, coordinator)
  # Open MPI and MPICH start their helpers with srun, so below mpirun the variables of Slurm are about the helpers.
  if 'OMPI_COMM_WORLD_SIZE' in environment:
    return _of_open_mpi(environment, coordinator)
  if 'PMI_SIZE' in environment and 'MPI_LOCALNRANKS' in environment:  # srun may set PMI_SIZE, but not the other one
    return _of_mpich(environment, coordinator)
  if 'SLURM_STEP_NUM_TASKS' in environment:
    return _of_slurm(environment, coordinator)
  if 'TPU_WORKER_HOSTNAMES' in environment or _is_tpu_vm(environment):
    return _of_tpu(environment, coordinator)
  return None


def forgotten(environment: Mapping[str, str]) -> str:
  """Returns a hint for a process that works alone because nobody wrote srun, or an empty text."""
  tasks = environment.get('SLURM_NTASKS') or environment.get('SLURM_JOB_NUM_NODES', '1')
  if tasks == '1' or 'SLURM_STEP_NUM_TASKS' in environment or find(environment):
    return ''
  return f'this job of Slurm has room for {tasks} processes, and this is the only one: `srun python main.py` starts all'


def _of_variables(environment: Mapping[str, str], coordinator: str | None) -> Place | None:
  """Reads the variables that Kubeflow Trainer and deploy/jobset.yaml set."""
  count = _number(environment, 'JAX_NUM_PROCESSES', 1)
  if count == 1:
    return None
  name = 'JAX_PROCESS_ID' if 'JAX_PROCESS_ID' in environment else 'JOB_COMPLETION_INDEX'
  found = 'Kubernetes' if 'KUBERNETES_SERVICE_HOST' in environment else 'JAX_NUM_PROCESSES'
  address = coordinator or _text(environment, 'JAX_COORDINATOR_ADDRESS')
  return Place(address, count, _index(environment, name, count), found)


def _of_open_mpi(environment: Mapping[str, str], coordinator: str | None) -> Place | None:
  """Reads the variables of Open MPI's mpirun, which is taken to run on the host of process 0."""
  count = _number(environment, 'OMPI_COMM_WORLD_SIZE', 1)
  if count == 1:
    return None
  index = _index(environment, 'OMPI_COMM_WORLD_RANK', count)
  # 4: `465305600.0;tcp://192.0.2.2,10.0.0.2:52177;tcp6://[fd00::2]:51741`; the job's number is a multiple of 65536
  old = re.match(
    r'(?P<job>\d+)\.\d+;(?:tcp://(?P<host>[^,:;]+)|tcp6://\[(?P<host6>[^],]+))',
    environment.get('OMPI_MCA_orte_hnp_uri', ''),
  )
  # 5: `prterun-HOST-PID@1`
  new = re.match(r'prte(?:run)?-(?P<host>.+)-(?P<pid>\d+)@', environment.get('PMIX_NAMESPACE', ''))
  if coordinator:
    address = coordinator
  elif old:
    address = f'{old["host"] or "[" + old["host6"] + "]"}:{_port(int(old["job"]) // 65536)}'
  elif new:
    address = f'{new["host"]}:{_port(int(new["pid"]))}'
  else:
    raise errors.UserError(
      'the MPI that started this process does not say where process 0 runs: give --coordinator=HOST:PORT, with the '
      'host of process 0 and a free port there'
    )
  return Place(address, count, index, 'Open MPI')


def _of_mpich(environment: Mapping[str, str], coordinator: str | None) -> Place | None:
  """Reads the variables of hydra, which is the mpirun of MPICH and of Intel MPI."""
  count = _number(environment, 'PMI_SIZE', 1)
  if count == 1:
    return None
  if not coordinator:
    raise errors.UserError(
      'MPICH and Intel MPI do not say where process 0 runs: give --coordinator=HOST:PORT, with the host of process 0 '
      'and a free port there'
    )
  return Place(coordinator, count, _index(environment, 'PMI_RANK', count), 'MPICH or Intel MPI')


def _of_slurm(environment: Mapping[str, str], coordinator: str | None) -> Place | None:
  """Reads the variables of a job step: those of the job are also there without srun, where one process runs."""
  count = _number(environment, 'SLURM_STEP_NUM_TASKS', 1)
  if count == 1:
    return None
  job = _number(environment, 'SLURM_JOB_ID', 0)
  step = _number(environment, 'SLURM_STEP_ID', 0)
  address = coordinator or f'{first_host(_text(environment, "SLURM_STEP_NODELIST"))}:{_port(31 * job + step)}'
  return Place(address, count, _index(environment, 'SLURM_PROCID', count), 'Slurm')


def first_host(nodes: str) -> str:
  """Returns the first host of Slurm's notation, such as node001 of `node[001-003,7],other`.

  Raises:
    UserError: it is no list of hosts.
  """
  entry = re.match(r'((?:[^][,]|\[[^][]*\])*)(?:,|$)', nodes)  # to the first comma that is outside of brackets
  host = re.sub(r'\[(\w+)[-,\w]*\]', r'\1', entry[1]) if entry else ''
  if not re.fullmatch(r'[\w.-]+', host):
    raise errors.UserError(f'SLURM_STEP_NODELIST={nodes} in the environment is no list of hosts: {_HINT}')
  return host


def _of_tpu(environment: Mapping[str, str], coordinator: str | None) -> Place | None:
  """Reads the variables that GKE sets for a slice of TPUs, or asks the metadata server of a TPU VM."""
  if 'TPU_WORKER_HOSTNAMES' not in environment:
    environment = _variables_of_tpu_vm(environment)
    if environment is None:
      return None
  hosts = _text(environment, 'TPU_WORKER_HOSTNAMES').split(',')
  slices = _number(environment, 'MEGASCALE_NUM_SLICES', 1) if environment.get('MEGASCALE_NUM_SLICES') else 1
  count = len(hosts) * slices
  if count == 1:
    return None
  index, host = _index(environment, 'TPU_WORKER_ID', len(hosts)), hosts[0]
  if slices > 1:
    index += _index(environment, 'MEGASCALE_SLICE_ID', slices) * len(hosts)
    host = _text(environment, 'MEGASCALE_COORDINATOR_ADDRESS')
  return Place(coordinator or f'{host.split(":")[0]}:{TPU_PORT}', count, index, 'Cloud TPU')


def _is_tpu_vm(environment: Mapping[str, str]) -> bool:
  """Returns whether this machine has a TPU and may ask Google's metadata server."""
  if environment.get('TPU_SKIP_MDS_QUERY') or importlib.util.find_spec('libtpu') is None:
    return False
  return bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'))


def _variables_of_tpu_vm(environment: Mapping[str, str]) -> dict[str, str] | None:
  """Returns what GKE would have set, from the metadata server; None outside of Google's cloud."""
  worker = _metadata(environment, 'agent-worker-number')
  endpoints = _metadata(environment, 'worker-network-endpoints')
  if worker is None or endpoints is None:
    return None
  pairs = (line.split(':', 1) for line in (_metadata(environment, 'tpu-env') or '').splitlines() if ':' in line)
  variables = {name.strip(): value.strip().strip("'") for name, value in pairs}
  hosts = [endpoint.split(':')[-1] for endpoint in endpoints.split(',')]  # HOST, or formerly NAME:ID:ADDRESS
  return variables | {'TPU_WORKER_ID': worker, 'TPU_WORKER_HOSTNAMES': ','.join(hosts)}


def _metadata(environment: Mapping[str, str], name: str) -> str | None:
  """Returns an attribute of this virtual machine; None if there is no such attribute, or no metadata server."""
  server = environment.get('GCE_METADATA_HOST', 'metadata.google.internal')
  url = f'http://{server}/computeMetadata/v1/instance/attributes/{name}'
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach the server
  try:
    with opener.open(request, timeout=10) as answer:
      return answer.read().decode().strip()
  except OSError:  # HTTPError is one too
    return None


def _text(environment: Mapping[str, str], name: str) -> str:
  """Returns a variable that must be there."""
  value = environment.get(name, '').strip()
  if not value:
    raise errors.UserError(f'{name} is missing in the environment, where the launcher sets it: {_HINT}')
  return value


def _number(environment: Mapping[str, str], name: str, lowest: int) -> int:
  """Returns a variable that must be a whole number."""
  value = _text(environment, name)
  if not re.fullmatch('[0-9]{1,18}', value) or int(value) < lowest:
    raise errors.UserError(f'{name}={value} in the environment is no whole number from {lowest}: {_HINT}')
  return int(value)


def _index(environment: Mapping[str, str], name: str, count: int) -> int:
  """Returns a variable that must be one of `count` numbers."""
  index = _number(environment, name, 0)
  if index >= count:
    raise errors.UserError(f'{name}={index} in the environment is too large for {count} processes: {_HINT}')
  return index


def _port(number: int) -> int:
  """Returns a port for a job: all processes of it find the same one, and jobs that share a host another one each."""
  return _FIRST_PORT + number % (65536 - _FIRST_PORT)
