"""Names in any alphabet, and pictures that do not depend on the user's matplotlib settings."""

import logging
import os
import shutil
import sys
import types

import matplotlib
import pytest
from matplotlib import font_manager, style

from googlenet_jax.data import listing
from googlenet_jax.evaluation import drawing, fonts, own_matplotlib, plots
from googlenet_jax.host.errors import one_line

OTHER = '\u1d81'  # in STIXGeneral, which comes with matplotlib; not in DejaVu Sans


@pytest.fixture(autouse=True)
def as_at_the_start(monkeypatch):
  monkeypatch.setattr(fonts, '_used', [fonts.OWN])
  monkeypatch.setattr(fonts, '_lacking', {})
  monkeypatch.setattr(fonts, '_said', False)
  fonts._find.cache_clear()
  yield
  fonts._find.cache_clear()
  fonts._new_names.cache_clear()


@pytest.fixture
def known(monkeypatch):
  """matplotlib knows its own fonts only, and `known(PATH)` is what is installed beside them."""
  own = os.path.dirname(font_manager.findfont('DejaVu Sans'))
  manager = font_manager.FontManager.__new__(font_manager.FontManager)
  manager.__dict__.update(font_manager.fontManager.__dict__)
  manager.ttflist = [font for font in manager.ttflist if os.path.dirname(font.fname) == own]
  monkeypatch.setattr(font_manager, 'fontManager', manager)
  installed = []
  monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: installed)
  fonts._new_names.cache_clear()
  return lambda path, name: (
    installed.append(str(path)),
    setattr(manager, 'ttflist', [font for font in manager.ttflist if font.name != name]),
  )


def test_a_letter_has_the_first_font_that_draws_it(known):
  for letter in 'aé_$\u00a0\ufe0f\u200d':
    fonts.look_up(letter)
  assert fonts.families() == ['DejaVu Sans']
  fonts.look_up(OTHER)
  assert fonts.families() == ['DejaVu Sans', 'STIXGeneral']
  assert drawing.user_text() == {'parse_math': False, 'family': ['DejaVu Sans', 'STIXGeneral']}


def test_fonts_that_were_installed_after_matplotlib_listed_them_are_found(known, tmp_path):
  path = shutil.copy(font_manager.findfont('STIXGeneral'), tmp_path)
  (tmp_path / 'damaged.ttf').write_text('no font')
  known(tmp_path / 'damaged.ttf', 'STIXGeneral')
  known(path, 'STIXGeneral')
  fonts.look_up(OTHER)
  assert fonts.families() == ['DejaVu Sans', 'STIXGeneral']
  assert fonts._faces('STIXGeneral') == [path]


def test_letters_that_no_font_has_are_named_in_one_line(known, tmp_path, monkeypatch, capsys, recwarn):
  monkeypatch.setattr(drawing, 'DPI', 30)
  monkeypatch.setattr(fonts, '_known_names', list)
  drawing.fit('鼠', 100, 9)  # belongs to none of the pictures below
  drawing.save(tmp_path / 'a.png', lambda: drawing.new_figure(1.0, f'{OTHER * 3}石a'))
  drawing.save(tmp_path / 'b.png', lambda: drawing.new_figure(1.0, '英' + ''.join(map(chr, range(0x4E00, 0x4E30)))))
  assert capsys.readouterr().err == (
    f'warning: no installed font has {OTHER} 石: pictures show boxes; fonts such as Noto have them\n'
  )
  assert not recwarn.list


def test_texts_are_literal_and_marks_stay_with_their_letters():
  assert drawing.fit('$x_1^2$ \\alpha {a}_b %', 500, 9) == '$x_1^2$ \\alpha {a}_b %'
  assert drawing.fit('a\tb\nc\x1b[0m\udcff', 500, 9) == 'a\\tb\\nc\\x1b[0m\\udcff'
  family = '👩\u200d🌾'
  assert drawing._letters(f'कि{family}é') == ['कि', family, 'é']
  for points in range(20, 200, 7):
    for line in drawing.fit('कीबोर्ड ' * 6, points, 9, 2).replace('…', '\n').split('\n'):
      assert not line or line[0] in 'कबरड'  # no line begins with a mark


def test_words_that_need_joiners_are_names_of_classes(tmp_path):
  names = ['می\u200cخواهم', '👩\u200d🌾']
  for name in names:
    (tmp_path / name).mkdir()
    (tmp_path / name / '1.png').touch()
    assert one_line(name) == name
  assert set(listing.find(tmp_path).classes) == set(names)


@pytest.mark.filterwarnings('ignore::matplotlib.MatplotlibDeprecationWarning')
def test_settings_of_the_user_do_not_reach_pictures_and_stay(tmp_path, monkeypatch):
  monkeypatch.setattr(drawing, 'DPI', 40)
  records = [{'epoch': e, 'split': 'train', 'loss': 1 / e, 'accuracy': 0.5, 'learning_rate': 0.1} for e in range(1, 5)]
  plots.curves(records, tmp_path / 'plain.png', '$5 and a_b')
  with matplotlib.rc_context():
    style.use('dark_background')
    matplotlib.rcParams.update({'text.usetex': True, 'font.family': 'no such font', 'savefig.bbox': 'tight'})
    matplotlib.rcParams.update({'lines.linewidth': 9, 'font.size': 30, 'figure.dpi': 7, 'axes.grid': True})
    before = dict(matplotlib.rcParams)
    plots.curves(records, tmp_path / 'own.png', '$5 and a_b')
    assert dict(matplotlib.rcParams) == before
  assert (tmp_path / 'own.png').read_bytes() == (tmp_path / 'plain.png').read_bytes()


@pytest.mark.parametrize('valid', [True, False])
def test_a_backend_that_is_not_installed_does_not_end_the_import(valid, monkeypatch):
  """As in a notebook's `!python`, where MPLBACKEND=module://matplotlib_inline.backend_inline."""

  class Settings(dict):
    def __setitem__(self, key, value):
      if not valid:
        raise ValueError(f'{value} is not a valid value for {key}')
      super().__setitem__(key, value)

  monkeypatch.setenv('MPLBACKEND', 'a backend')
  monkeypatch.delitem(sys.modules, 'matplotlib')
  logger = logging.getLogger('matplotlib')
  level = logger.level
  with own_matplotlib._importing():
    assert 'MPLBACKEND' not in os.environ
    assert not logger.isEnabledFor(logging.WARNING)
    settings = Settings()
    monkeypatch.setitem(sys.modules, 'matplotlib', types.SimpleNamespace(rcParams=settings))
  assert settings == ({'backend': 'a backend'} if valid else {})
  assert os.environ['MPLBACKEND'] == 'a backend'
  assert logger.level == level


def test_a_file_of_settings_that_cannot_be_read_is_one_line(monkeypatch):
  monkeypatch.delitem(sys.modules, 'matplotlib')
  with (
    pytest.raises(OSError, match=r"^matplotlib cannot be used \('utf-8' codec .*: look at your file matplotlibrc$"),
    own_matplotlib._importing(),
  ):
    b'\xff'.decode()
