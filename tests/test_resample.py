import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from googlenet_jax.data import resample

PIL = {'linear': Image.Resampling.BILINEAR, 'cubic': Image.Resampling.BICUBIC, 'nearest': Image.Resampling.NEAREST}
SMOOTH = np.add.outer(np.sin(np.arange(23) / 3), np.cos(np.arange(31) / 4)).astype(np.float32)


sampling_matrix = jax.jit(resample.sampling_matrix, static_argnums=(3, 4, 5))


@pytest.mark.parametrize('kernel', PIL)
@pytest.mark.parametrize('box', [(0, 0, 31, 23), (3, 2, 20, 21), (4.3, 1.7, 29.9, 11.2)])  # left, upper, right, lower
@pytest.mark.parametrize('out', [8, 40])
def test_resampling_a_box_equals_pils_resize(kernel, box, out):
  left, upper, right, lower = map(float, box)
  index = resample.KERNELS.index(kernel)
  canvas = np.pad(SMOOTH, ((0, 9), (0, 4)), constant_values=9)  # must not be seen
  rows = sampling_matrix(upper, lower - upper, 23, out, 32, index)
  columns = sampling_matrix(left, right - left, 31, out, 35, index)
  assert (np.asarray(rows)[:, 23:] == 0).all()
  ours = jax.jit(resample.resample)(canvas[None, ..., None], rows, columns)[0, ..., 0]
  theirs = np.asarray(Image.fromarray(SMOOTH).resize((out, out), PIL[kernel], box=box))
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_area_is_the_mean_over_the_part_that_becomes_a_pixel():
  matrix = sampling_matrix(1.0, 5.0, 8, 2, 8, resample.KERNELS.index('area'))
  np.testing.assert_allclose(
    matrix, np.array([[0, 1, 1, 0.5, 0, 0, 0, 0], [0, 0, 0, 0.5, 1, 1, 0, 0]]) / 2.5, rtol=1e-6
  )


def test_a_batch_has_the_matrices_of_its_images():
  starts, extents, sizes = jnp.array([0.0, 2.5]), jnp.array([7.0, 3.0]), jnp.array([7, 6])
  kernels = jnp.array([1, 2])
  both = jax.jit(lambda *a: resample.sampling_matrix(*a[:3], 4, 9, a[3]))(starts, extents, sizes, kernels)
  for i in range(2):
    one = sampling_matrix(starts[i], extents[i], sizes[i], 4, 9, int(kernels[i]))
    np.testing.assert_allclose(both[i], one, atol=1e-6)
