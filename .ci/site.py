"""MkDocs hook: result files, which pages link to in the repository, are part of the site."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = "packages/hora-bench/results"


def on_files(files, *, config):
    """Add every result file as ``results/NAME.json``."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Links to where they are in the repository lead there."""
    return markdown.replace(f"](../../{RESULTS}/", "](../results/").replace(f"](../{RESULTS}/", "](results/")
