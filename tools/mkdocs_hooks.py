"""MkDocs hooks: pages from elsewhere in the repository, links that work there and on the site, and plots."""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import plot_benchmarks  # noqa: E402

# Pages of the site that are other files of the repository than docs/PAGE.
PAGES = {
    'index.md': 'README.md',
    'classification.md': 'classification/README.md',
    'detection.md': 'detection/README.md',
    'segmentation.md': 'segmentation/README.md',
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.md',
    **{
        f'operators/{name}.md': f'kernels/{name}/README.md'
        for name in ('bi_wkv', 'wkv6', 'q_shift', 'pointwise', 'fused', 'dynamic_mix', 'block', 'autograd')
    },
}
FENCED = re.compile(r'^(```.*?^```)$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(!?)\[([^\]\n]*)\]\(([^)\s]+)\)')


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return PAGES.get(page, f'docs/{page}')


def page_of(path: str) -> str | None:
    """The page of the site, or other file of docs/, that a file of the repository becomes; None if it becomes none.

    A folder stands for its README.
    """
    sources = {source: page for page, source in PAGES.items()}
    for candidate in (path, f'{path}/README.md'):
        if candidate in sources:
            return sources[candidate]
    return path.removeprefix('docs/') if path.startswith('docs/') and (ROOT / path).is_file() else None


def rewrite(markdown: str, page: str, repository: str) -> str:
    """``markdown`` with the relative links of its source made relative to the page, or to the repository's address.

    Code blocks stay as they are, and so do links to nowhere, which MkDocs then names. Without an address, links that
    lead out of the site become their text.
    """

    def new_link(found: re.Match) -> str:
        mark, text, link = found.groups()
        path, _, anchor = link.partition('#')
        if not path or '://' in path or path.startswith('mailto:'):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), path))
        anchor = f'#{anchor}' if anchor else ''
        if target := page_of(path):
            return f'{mark}[{text}]({posixpath.relpath(target, posixpath.dirname(page) or ".")}{anchor})'
        if not (ROOT / path).exists():
            return found[0]
        kind = 'tree' if (ROOT / path).is_dir() else 'blob'
        return f'{mark}[{text}]({repository.rstrip("/")}/{kind}/main/{path}{anchor})' if repository else text

    parts = FENCED.split(markdown)
    return ''.join(part if number % 2 else LINK.sub(new_link, part) for number, part in enumerate(parts))


def on_files(files: Files, config) -> Files:
    """Add the pages from elsewhere, and the plots of the benchmarks."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name, picture in plot_benchmarks.draw_all((ROOT / plot_benchmarks.PAGE).read_text()).items():
        files.append(File.generated(config, f'plots/{name}.svg', content=picture))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite the links; put each plot where its mark is."""
    name = page.file.src_uri
    markdown = rewrite(markdown, name, config.repo_url or '')
    return plot_benchmarks.show(markdown, 'plots') if source_of(name) == plot_benchmarks.PAGE else markdown
