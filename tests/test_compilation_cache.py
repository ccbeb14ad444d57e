"""Where compiled programs are kept, and that the next process reads them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import vlcache_jax as vlc
from vlcache_jax.cli.checkpoint import keep_programs
from vlcache_jax.files.compilation_cache import default_folder
from vlcache_jax.terminal.progress import Progress

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLCACHE_JAX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vlcache_jax"
    monkeypatch.setenv("VLCACHE_JAX_CACHE_DIR", str(tmp_path / "chosen"))
    assert vlc.use_compilation_cache() == tmp_path / "chosen"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    assert (tmp_path / "chosen").stat().st_mode & 0o777 == 0o700  # programs that others could change


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    for folder in (tmp_path / "file" / "inside", "a\0b"):
        with pytest.raises(vlc.InputError, match=r"no compilation cache in .*: choose another folder"):
            vlc.use_compilation_cache(folder)
    monkeypatch.setenv("VLCACHE_JAX_CACHE_DIR", str(tmp_path / "file" / "inside"))
    keep_programs(True, Progress())
    assert "programs are compiled anew" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before


def test_the_next_process_reads_the_programs(tmp_path: Path) -> None:
    code = """
import sys
import jax, jax.numpy as jnp
import vlcache_jax as vlc
vlc.use_compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(sum(hits))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first, second = (
        int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120).stdout)
        for _ in range(2)
    )
    assert first == 0
    assert second > 0
