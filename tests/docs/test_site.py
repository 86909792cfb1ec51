"""The site: its links, its pages from elsewhere, and a strict build."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402

from tools import zoo  # noqa: E402
from tools.mkdocs_hooks import PAGES, page_of, rewrite  # noqa: E402

ADDRESS = 'https://example.org/house'


@pytest.mark.parametrize(
    'page, link, expected',
    [
        ('faq.md', '[x](install.md#cpu)', '[x](install.md#cpu)'),
        ('faq.md', '[x](../detection/README.md#data)', '[x](detection.md#data)'),
        ('faq.md', '[x](../kernels/wkv6)', '[x](operators/wkv6.md)'),
        ('index.md', '[x](docs/finetune.md)', '[x](finetune.md)'),
        ('index.md', '[x](kernels/bi_wkv/README.md)', '[x](operators/bi_wkv.md)'),
        ('detection.md', '[x](../README.md#model-zoo)', '[x](index.md#model-zoo)'),
        ('operators/wkv6.md', '[x](../bi_wkv/README.md)', '[x](bi_wkv.md)'),
        ('operators/wkv6.md', '[x](../../docs/benchmarks.md)', '[x](../benchmarks.md)'),
        ('detection.md', '[x](../tools/train.py)', f'[x]({ADDRESS}/blob/main/tools/train.py)'),
        ('index.md', '[x](tools)', f'[x]({ADDRESS}/tree/main/tools)'),
        ('index.md', '[x](LICENSE) and [y](docs/data.md)', f'[x]({ADDRESS}/blob/main/LICENSE) and [y](data.md)'),
        ('tutorial.md', '![x](images/tutorial.png)', '![x](images/tutorial.png)'),
        ('faq.md', '[x](no-such-page.md)', '[x](no-such-page.md)'),
        ('faq.md', '[x](https://arxiv.org/abs/1) [y](#here)', '[x](https://arxiv.org/abs/1) [y](#here)'),
        ('faq.md', '```python\na[0](../README.md)\n```\n', '```python\na[0](../README.md)\n```\n'),
    ],
)
def test_links(page, link, expected):
    assert rewrite(link, page, ADDRESS) == expected
    assert rewrite(link, page, f'{ADDRESS}/') == expected


def test_without_an_address_links_out_of_the_site_are_text():
    assert (
        rewrite('see [the script](../tools/train.py), [Data](data.md)', 'faq.md', '')
        == 'see the script, [Data](data.md)'
    )


def test_pages_from_elsewhere():
    assert all((ROOT / source).is_file() for source in PAGES.values())
    assert page_of('kernels/wkv6') == 'operators/wkv6.md' and page_of('docs/faq.md') == 'faq.md'
    assert page_of('tools/train.py') is None and page_of('docs/none.md') is None
    operators = {f'kernels/{path.parent.name}/README.md' for path in ROOT.glob('kernels/*/README.md')}
    assert operators <= set(PAGES.values())


def markdown_files() -> list[Path]:
    sources = {ROOT / source for source in PAGES.values()}
    return sorted(sources | set(ROOT.glob('docs/*.md')))


@pytest.mark.parametrize('path', markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve_in_the_repository(path):
    """As GitHub resolves them: files and, in Markdown, headings."""
    text = re.sub(r'^```.*?^```$', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in link:
            continue
        file, _, anchor = link.partition('#')
        target = path.parent / file if file else path
        assert target.exists(), f'{path}: {link}'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', target.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f'{path}: {link}'


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


def test_the_repository_has_one_setting(monkeypatch):
    monkeypatch.setenv('REPOSITORY_URL', ADDRESS)
    assert load_config(str(ROOT / 'mkdocs.yml')).repo_url == ADDRESS
    monkeypatch.delenv('REPOSITORY_URL')
    assert not load_config(str(ROOT / 'mkdocs.yml')).repo_url


def test_strict_build(monkeypatch, tmp_path):
    monkeypatch.setenv('REPOSITORY_URL', ADDRESS)
    build(load_config(str(ROOT / 'mkdocs.yml'), strict=True, site_dir=str(tmp_path)))
    bi_wkv = (tmp_path / 'operators/bi_wkv.html').read_text()
    assert 'bidirectional WKV operator' in bi_wkv
    benchmarks = (tmp_path / 'benchmarks.html').read_text()
    for picture in re.findall(r'<img alt="[^"]+" src="(plots/\w+\.svg)"', benchmarks):
        assert (tmp_path / picture).read_bytes().startswith(b'<?xml')
    assert benchmarks.count('src="plots/') == 6 and '<!-- plot' not in benchmarks
    models = (tmp_path / 'zoo.html').read_text()
    assert all(
        f'"{row.weights}"' in models and f'"{ADDRESS}/blob/main/{row.config}"' in models for row in zoo.read_all()
    )
    assert not [path for path in tmp_path.rglob('*.html') if 'fonts.googleapis' in path.read_text()]


def test_model_index_and_citation():
    from modelindex.load_model_index import load

    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == 16
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    assert citation['version'] == version and f'\n## {version}' in (ROOT / 'CHANGELOG.md').read_text()
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
