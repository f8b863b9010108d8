"""The file for JAX. This module traces the forms of layers for every platform, see tests/conftest.py."""

import collections
import pathlib
import re

import jax
import numpy as np
import pytest
from helpers import random_state, small_config
from jax import export
from jax.interpreters import mlir
from jaxlib.mlir import ir, passmanager

from googlenet_jax.classifier import Classifier
from googlenet_jax.exporting import artefact, sample, stablehlo
from googlenet_jax.host import backend
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet


@pytest.fixture
def make(small_network, monkeypatch, mesh_of):
  """`make(members=1, **changes)`: an ensemble of networks that nobody trained."""
  monkeypatch.delitem(googlenet.TABLE, 'inception_3b')

  def make(members=1, **changes):
    config = small_config(**changes)
    states = [random_state(config, seed) for seed in range(members)]
    networks = [(state.params, state.batch_stats) for state in states]
    return Classifier(config, tuple('abcdefghij'), 1, networks, mesh_of(1), [0] * members)

  return make


def images(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def operations(text, platforms, platform):
  """How often each operation comes in a program that is known to run on one of its platforms."""
  with mlir.make_ir_context():
    module = ir.Module.parse(text)
    main = next(f for f in module.body.operations if f.sym_name.value == 'main')
    block = main.regions[0].blocks[0]
    if len(platforms) > 1:
      number = ir.DenseElementsAttr.get(np.array(platforms.index(platform), np.int32))
      with ir.InsertionPoint.at_block_begin(block), ir.Location.unknown():
        kind = block.arguments[0].type
        known = ir.Operation.create('stablehlo.constant', [kind], attributes={'value': number})
        block.arguments[0].replace_all_uses_with(known.result)
    # What remains when the choices between platforms are made.
    passmanager.PassManager.parse('builtin.module(inline,sccp,canonicalize,symbol-dce)').run(module.operation)
    text = module.operation.get_asm(large_elements_limit=4)
  return collections.Counter(re.findall(r'= "?stablehlo\.([a-z_0-9]+)', text))


# What computes. Operations that only move numbers differ: in the file, the number and the size of images are not known.
COMPUTING = ('convolution', 'dot_general', 'reduce_window', 'reduce', 'pad', 'divide', 'exponential')


def test_a_gpu_and_a_tpu_get_the_forms_that_jit_compiles_there(make):
  classifier = make()
  together, found = stablehlo.exported(classifier), {}
  assert together.platforms == ('cpu', 'cuda', 'tpu')
  traced = jax.jit(stablehlo._probabilities(classifier)).trace(jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8))
  for platform in ('cuda', 'tpu'):
    with backend.our_settings():
      alone = traced.lower(lowering_platforms=(platform,)).as_text()
    counts = operations(together.mlir_module(), together.platforms, platform)
    expected = operations(alone, (platform,), platform)
    found[platform] = [counts[name] for name in COMPUTING]
    assert found[platform] == [expected[name] for name in COMPUTING]
    assert 'case' not in counts
  # As in tests/test_gpu_layers.py: only a TPU has XLA's own max-pooling.
  pools = COMPUTING.index('reduce_window')
  assert (found['cuda'][pools], found['tpu'][pools] > 0) == (0, True)


def test_settings_of_jax_and_places_on_this_machine_are_not_in_the_file(make):
  classifier = make()
  data = stablehlo.exported(classifier).serialize()
  assert b'.py' not in data
  limit = jax.config.jax_traceback_in_locations_limit
  with jax.enable_x64(True), jax.default_matmul_precision('bfloat16'), jax.numpy_rank_promotion('raise'):
    again = stablehlo.exported(classifier)
  assert again.serialize() == data
  assert jax.config.jax_traceback_in_locations_limit == limit
  # On a GPU or TPU the least precision is the default: every product and every convolution asks for the highest.
  products = re.findall(r'stablehlo\.(?:dot_general|convolution)[^\n]*', again.mlir_module())
  assert len(products) > 20
  assert all('HIGHEST' in product for product in products)


def test_an_ensemble_with_padding_and_auxiliary_classifiers_is_one_file_for_images_of_any_size(make, tmp_path):
  options = {'model.auxiliary': 'adaptive_pool', 'augment.padding': 2, 'augment.resize': 1.2, 'image_size': 21}
  classifier = make(2, **options)
  made = stablehlo.write(classifier, tmp_path)
  assert [*made.files] == ['googlenet.stablehlo']
  weights = [leaf.nbytes for leaf in jax.tree.leaves(classifier.networks)]
  auxiliary = [
    leaf.nbytes for params, _ in classifier.networks for leaf in jax.tree.leaves((params['aux_4a'], params['aux_4d']))
  ]
  size = (tmp_path / 'googlenet.stablehlo').stat().st_size
  assert 0 < size - sum(weights) + sum(auxiliary) < 200_000
  x = images(2, 40, 31, 1)  # tests/test_export.py has another size in the same file
  np.testing.assert_allclose(made.run(x), classifier.probabilities(x), atol=1e-6)
  with pytest.raises(ValueError, match='Shape mismatch'):
    made.run(images(2, 8, 8, 3))


def test_bfloat16_stays_and_has_a_tolerance_of_its_own(make, tmp_path):
  classifier = make(dtype='bfloat16')
  made = stablehlo.write(classifier, tmp_path)
  assert (made.facts['arithmetic'], made.tolerance) == ('bfloat16', 0.05)
  assert 'bf16' in export.deserialize(bytearray((tmp_path / 'googlenet.stablehlo').read_bytes())).mlir_module()
  x = list(images(4, 8, 8, 1))
  difference = abs(sample.answers(made.run, x) - sample.ours(classifier, x)).max()
  assert 1e-4 < difference < made.tolerance


def test_weights_beyond_the_format_are_refused(make, monkeypatch):
  monkeypatch.setattr(artefact, 'LARGEST', 1000)
  with pytest.raises(UserError, match='the stablehlo file would have .* GiB, and the format ends at 2'):
    stablehlo.exported(make())


def test_the_script_in_the_documentation_is_the_example():
  text = (pathlib.Path(__file__).parent.parent / 'docs' / 'export.md').read_text()
  assert f'```python\n{stablehlo.EXAMPLE}```' in text
