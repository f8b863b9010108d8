"""Takes the pictures of docs/page.md: the page of a run in a browser without a screen.

pip install -e '.[test]'; apt-get install chromium
python -m experiments.page_pictures runs/scenes PICTURE docs/pictures

  page_try.jpg     the picture, with its answer and the map of the likeliest class
  page_run.jpg     the run, from its curves to the confusion matrix with an open cell
  page_phone.jpg   the answer on a phone, dark
"""

import argparse
import pathlib
import shutil
import socket
import time

from googlenet_jax.page import app
from googlenet_jax.page.live import LiveRun
from googlenet_jax.page.uploads import Uploads

OPTIONS = ('--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update')
QUALITY = 80  # of JPEG


def main() -> None:
  """Serves the page, and takes its pictures."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('picture', type=pathlib.Path)
  parser.add_argument('output', type=pathlib.Path)
  options = parser.parse_args()
  with socket.socket() as trial:
    trial.bind(('127.0.0.1', 0))
    port = trial.getsockname()[1]
  run = LiveRun(options.workdir)
  page = app.Page([run], port, '127.0.0.1', Uploads())
  while not run.known.parts:
    time.sleep(0.1)
  take(page.address, options.picture, options.output)
  page.close()


def take(address: str, picture: pathlib.Path, output: pathlib.Path) -> None:
  """Takes all pictures of a page."""
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=OPTIONS)

    def opened(width: int, height: int, scheme: str):
      size = {'width': width, 'height': height}
      tab = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1.5).new_page()
      tab.goto(address)
      tab.wait_for_selector('.part-samples button')
      return tab

    def save(tab, name: str) -> None:
      tab.wait_for_function('!document.querySelector(".pending")')  # parts that wait for something are pale
      tab.wait_for_function('[...document.images].every(image => image.complete)')
      tab.screenshot(path=output / name, type='jpeg', quality=QUALITY, animations='disabled')

    for name, size, scheme in (('page_try.jpg', (1120, 860), 'light'), ('page_phone.jpg', (390, 844), 'dark')):
      tab = opened(*size, scheme)
      tab.set_input_files('input[type=file]', picture)
      tab.wait_for_selector('.map img')
      save(tab, name)
    tab = opened(1120, 860, 'light')
    tab.get_by_role('tab', name='The run').click()
    tab.locator('#curves').evaluate('element => element.scrollIntoView()')
    mistakes = tab.locator('.matrix td.w button')
    counts = [*map(int, mistakes.all_inner_texts())]
    mistakes.nth(counts.index(max(counts))).click()
    tab.get_by_role('dialog').wait_for()
    save(tab, 'page_run.jpg')
    browser.close()


if __name__ == '__main__':
  main()
