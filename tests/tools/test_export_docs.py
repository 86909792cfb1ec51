"""What docs/export.md shows runs; its command is that of test_export.py."""

import re
import shlex
import sys

from scripts import ROOT

from tools import export

PAGE = (ROOT / 'docs/export.md').read_text()


def test_the_command(monkeypatch):
    (command,) = re.findall(r'```bash\n(.*?)\n```', PAGE, re.DOTALL)
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ('python', 'tools/export.py') and (ROOT / arguments[0]).is_file()
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    args = export.parse_args()
    assert (args.format, str(args.out)) == ('onnx', 'work_dirs/digits/best.onnx')


def test_every_option_is_on_the_page():
    for name in export.FORMATS:
        assert f'`--format {name}`' in PAGE
    for option in ('--shape H W', '--dynamic-size MAX', '--device cuda', '--out'):
        assert f'`{option}`' in PAGE


def test_from_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)[-1]
    names: dict = {}
    exec(compile(code, 'export.md', 'exec'), names)
    assert names['features'].shape == (1, 64)
    assert (tmp_path / 'pooled.pt2').is_file()
