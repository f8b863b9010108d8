import http.server
import threading

import pytest

from googlenet_jax.host import clusters, errors

# What these launchers set, as printed by `mpirun -n 2 env` and `srun -n 2 env`, less what is not read.
OPEN_MPI_4 = {
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
  'OMPI_MCA_orte_hnp_uri': '464846848.0;tcp://192.0.2.2:39947;tcp6://[fd00::2]:38791',
  'PMIX_NAMESPACE': '464846849',
}
OPEN_MPI_5 = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1', 'PMIX_NAMESPACE': 'prterun-my-node-912@1'}
MPICH = {'PMI_SIZE': '2', 'PMI_RANK': '1', 'PMI_FD': '9', 'MPI_LOCALNRANKS': '2', 'MPI_LOCALRANKID': '1'}
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_STEP_ID': '3',
  'SLURM_STEP_NODELIST': 'node[001-002]',
  'SLURM_STEP_NUM_TASKS': '2',
}
KUBERNETES = {
  'JAX_COORDINATOR_ADDRESS': 'run-worker-0-0.run:8482',
  'JAX_NUM_PROCESSES': '8',
  'JOB_COMPLETION_INDEX': '5',
  'KUBERNETES_SERVICE_HOST': '10.0.0.1',
}
TPU = {'TPU_WORKER_HOSTNAMES': 'tpu-0.tpu,tpu-1.tpu', 'TPU_WORKER_ID': '1'}
SLICES = {
  'MEGASCALE_NUM_SLICES': '2',
  'MEGASCALE_SLICE_ID': '1',
  'MEGASCALE_COORDINATOR_ADDRESS': 'tpu-0-0.tpu:8081',
}


@pytest.mark.parametrize(
  ('environment', 'place'),
  [
    (OPEN_MPI_4, ('192.0.2.2:64437', 2, 1, 'Open MPI')),
    (OPEN_MPI_4 | {'OMPI_MCA_orte_hnp_uri': '65536.0;tcp://10.0.0.1,10.0.0.2:4'}, ('10.0.0.1:61441', 2, 1, 'Open MPI')),
    (OPEN_MPI_4 | {'OMPI_MCA_orte_hnp_uri': '65536.0;tcp6://[fd::1,fd::2]:4'}, ('[fd::1]:61441', 2, 1, 'Open MPI')),
    (OPEN_MPI_5, ('my-node:62352', 2, 1, 'Open MPI')),
    (SLURM, ('node001:61660', 2, 1, 'Slurm')),
    (SLURM | {'PMI_SIZE': '2', 'PMI_RANK': '1'}, ('node001:61660', 2, 1, 'Slurm')),  # srun --mpi=pmi2
    (SLURM | {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '4'} | OPEN_MPI_5, ('my-node:62352', 2, 1, 'Open MPI')),
    (KUBERNETES, ('run-worker-0-0.run:8482', 8, 5, 'Kubernetes')),
    (KUBERNETES | {'JAX_PROCESS_ID': '6'}, ('run-worker-0-0.run:8482', 8, 6, 'Kubernetes')),
    (TPU, ('tpu-0.tpu:8482', 2, 1, 'Cloud TPU')),
    (TPU | SLICES, ('tpu-0-0.tpu:8482', 4, 3, 'Cloud TPU')),
    (TPU | SLICES | {'TPU_WORKER_HOSTNAMES': 'a', 'TPU_WORKER_ID': '0'}, ('tpu-0-0.tpu:8482', 2, 1, 'Cloud TPU')),
  ],
)
def test_each_launcher_is_found(environment, place):
  assert clusters.find(environment) == place


@pytest.mark.parametrize(
  'environment',
  [
    {},
    # A batch script, or a shell of salloc, before srun.
    {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0', 'SLURM_NODELIST': 'node[1-8]'},
    SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_STEP_ID': '4294967290'},  # the shell that salloc opens on a node
    OPEN_MPI_4 | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    SLURM | OPEN_MPI_4 | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    MPICH | {'PMI_SIZE': '1', 'PMI_RANK': '0'},
    KUBERNETES | {'JAX_NUM_PROCESSES': '1'},
    {'JOB_COMPLETION_INDEX': '5', 'KUBERNETES_SERVICE_HOST': '10.0.0.1'},  # eight runs of their own
    {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
  ],
)
def test_one_process_works_alone(environment):
  assert clusters.find(environment) is None


@pytest.mark.parametrize(
  ('environment', 'hint'),
  [
    ({}, False),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, False),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}, True),
    ({'SLURM_JOB_ID': '7', 'SLURM_JOB_NUM_NODES': '8'}, True),
    (SLURM, False),
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, False),  # a step of one task, on purpose
    ({'SLURM_NTASKS': '8'} | OPEN_MPI_5, False),
  ],
)
def test_a_forgotten_srun_is_noticed(environment, hint):
  assert bool(clusters.forgotten(environment)) == hint


@pytest.mark.parametrize('environment', [OPEN_MPI_4, OPEN_MPI_5, MPICH, SLURM, TPU, KUBERNETES])
def test_the_user_may_say_where_process_0_is(environment):
  place = clusters.find(environment, 'other:1234')
  assert place.coordinator == 'other:1234'
  assert place.index in (1, 5)


@pytest.mark.parametrize(
  ('nodes', 'host'),
  [
    ('node1', 'node1'),
    ('node1,node2', 'node1'),
    ('node[1-8]', 'node1'),
    ('node[001-003,7],other', 'node001'),
    ('node[07,9-12]', 'node07'),
    ('a-b.c[3,5],x[1-2]', 'a-b.c3'),
    ('rack[2-3]node[01-04],x', 'rack2node01'),
    ('node[1-2]-ib,x', 'node1-ib'),
    ('login,node[1-2]', 'login'),
  ],
)
def test_first_host_of_slurms_notation(nodes, host):
  assert clusters.first_host(nodes) == host


@pytest.mark.parametrize(
  ('environment', 'text'),
  [
    (OPEN_MPI_4 | {'OMPI_COMM_WORLD_SIZE': 'two'}, 'OMPI_COMM_WORLD_SIZE=two in the environment is no whole number'),
    (OPEN_MPI_4 | {'OMPI_COMM_WORLD_SIZE': '0'}, 'OMPI_COMM_WORLD_SIZE=0 in the environment is no whole number from 1'),
    (OPEN_MPI_4 | {'OMPI_COMM_WORLD_RANK': '2'}, 'OMPI_COMM_WORLD_RANK=2 in the environment is too large for 2'),
    (OPEN_MPI_4 | {'OMPI_COMM_WORLD_RANK': '-1'}, 'OMPI_COMM_WORLD_RANK=-1 in the environment is no whole number'),
    (OPEN_MPI_4 | {'OMPI_MCA_orte_hnp_uri': 'x'}, 'does not say where process 0 runs: give --coordinator=HOST:PORT'),
    (MPICH, 'MPICH and Intel MPI do not say where process 0 runs: give --coordinator=HOST:PORT'),
    (SLURM | {'SLURM_PROCID': ''}, 'SLURM_PROCID is missing in the environment'),
    (SLURM | {'SLURM_STEP_ID': 'TBD'}, 'SLURM_STEP_ID=TBD in the environment is no whole number'),
    (SLURM | {'SLURM_STEP_NODELIST': 'node[1'}, r'SLURM_STEP_NODELIST=node\[1 in the environment is no list of hosts'),
    (SLURM | {'SLURM_STEP_NODELIST': ',a'}, 'SLURM_STEP_NODELIST=,a in the environment is no list of hosts'),
    (SLURM | {'SLURM_STEP_NODELIST': '$(hosts)'}, 'is no list of hosts'),
    ({'JAX_NUM_PROCESSES': '2'}, 'JAX_COORDINATOR_ADDRESS is missing in the environment'),
    (KUBERNETES | {'JOB_COMPLETION_INDEX': '8'}, 'JOB_COMPLETION_INDEX=8 in the environment is too large for 8'),
    (TPU | {'TPU_WORKER_ID': '2'}, 'TPU_WORKER_ID=2 in the environment is too large for 2'),
    (TPU | {'MEGASCALE_NUM_SLICES': '2'}, 'MEGASCALE_SLICE_ID is missing in the environment'),
  ],
)
def test_a_mistake_names_the_variable(environment, text):
  with pytest.raises(errors.UserError, match=text):
    clusters.find(environment)


@pytest.fixture
def metadata():
  """A metadata server on loopback: attributes by name, and what it takes to ask it."""
  attributes = {}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      value = attributes.get(self.path.removeprefix('/computeMetadata/v1/instance/attributes/'))
      known = value is not None and self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200 if known else 404)
      self.end_headers()
      self.wfile.write((value if known else '').encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield attributes, {'GCE_METADATA_HOST': f'127.0.0.1:{server.server_port}'}
    server.shutdown()
    thread.join()


@pytest.mark.parametrize('endpoints', ['10.0.0.5,10.0.0.6', 'unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6'])
def test_a_tpu_vm_asks_the_metadata_server(metadata, monkeypatch, endpoints):
  attributes, environment = metadata
  monkeypatch.setattr(clusters, '_is_tpu_vm', lambda _: True)
  assert clusters.find(environment) is None  # no attributes: no TPU of several hosts
  attributes.update({'agent-worker-number': '1', 'worker-network-endpoints': endpoints, 'tpu-env': "ZONE: 'x'\n"})
  assert clusters.find(environment) == ('10.0.0.5:8482', 2, 1, 'Cloud TPU')
  attributes['tpu-env'] = ''.join(f"{name}: '{value}'\n" for name, value in SLICES.items())
  assert clusters.find(environment) == ('tpu-0-0.tpu:8482', 4, 3, 'Cloud TPU')


def test_a_tpu_vm_outside_of_googles_cloud_works_alone(monkeypatch):
  monkeypatch.setattr(clusters, '_is_tpu_vm', lambda _: True)
  assert clusters.find({'GCE_METADATA_HOST': '127.0.0.1:1'}) is None
