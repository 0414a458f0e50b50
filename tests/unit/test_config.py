"""Settings: where they come from, which goes first, and what is said about a wrong one."""

import math
import traceback
from pathlib import Path
from typing import Any

import pytest

from keepwarm.config import (
    Settings,
    all_settings,
    default_of,
    find_file,
    is_secret,
    load_settings,
    variable_of,
)
from keepwarm.core.errors import ConfigError
from keepwarm.server.settings import LogFormat

SECRET = "sk-9f8e7d"  # noqa: S105 - nobody's


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder nor the home has a file of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEEPWARM_HOME", str(tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def loaded(flags: dict[str, object] | None = None, **environment: str) -> Settings:
    return load_settings(flags, environment=environment)


def value_of(name: str, value: object) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(loaded({name: value}), section), key)


def refusal(flags: dict[str, object] | None = None, **environment: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loaded(flags, **environment)
    return caught.value


# -- sources ---------------------------------------------------------------------------------------


def test_without_anything_every_setting_has_its_default() -> None:
    assert loaded() == Settings()


def test_flags_go_before_the_environment_and_this_before_the_file(tmp_path: Path) -> None:
    write(
        tmp_path / "keepwarm.toml",
        "[server]\nport = 1\nmax_choices = 1\nrate_per_minute = 1\n[engine]\nmax_rows = 3\n",
    )
    settings = loaded({"server.port": 3}, KEEPWARM_SERVER_PORT="2", KEEPWARM_SERVER_MAX_CHOICES="2")
    assert settings.server.port == 3
    assert settings.server.max_choices == 2
    assert settings.server.rate_per_minute == 1
    assert settings.engine.max_rows == 3


def test_a_wrong_value_is_refused_even_where_another_replaces_it() -> None:
    assert refusal({"server.port": 3}, KEEPWARM_SERVER_PORT="eight").key == "server.port"


def test_the_file_is_the_named_one_else_the_one_here_else_the_one_at_home(tmp_path: Path) -> None:
    at_home = write(tmp_path / "home" / "keepwarm.toml", "")
    assert find_file({}) == at_home
    here = write(tmp_path / "keepwarm.toml", "")
    assert find_file({}) == here
    named = write(tmp_path / "other.toml", "[server]\nport = 5\n")
    assert loaded(KEEPWARM_CONFIG=str(named)).server.port == 5
    given = write(tmp_path / "given.toml", "[server]\nport = 6\n")
    settings = load_settings(config_file=given, environment={"KEEPWARM_CONFIG": str(named)})
    assert settings.server.port == 6


@pytest.mark.parametrize("content", [b"[server\n", b"port = \xff\n", b"n = " + b"9" * 5000])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert str(path) in str(refusal(KEEPWARM_CONFIG=str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert missing in str(refusal(KEEPWARM_CONFIG=missing))


def test_what_clients_need_is_no_setting_and_no_error() -> None:
    others = {"KEEPWARM_HOME": "/x", "KEEPWARM_URL": "x", "KEEPWARM_API_KEY": SECRET}
    assert loaded(**others, KEEPWARM_BLAS="none", KEEPWARM_CONFIG="", PATH="/bin") == Settings()


# -- unknown names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[server]\nprot = 1\n", "[sever]\nport = 1\n", "port = 1\n"])
def test_an_unknown_name_in_the_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "keepwarm.toml", text)
    error = refusal()
    assert error.key in {"server.prot", "sever", "port"}
    assert str(path) in error.problem


def test_an_unknown_variable_is_refused_by_name() -> None:
    assert refusal(KEEPWARM_SERVER_PROT="1").key == "KEEPWARM_SERVER_PROT"
    assert refusal(KEEPWARM_PORT="1").key == "KEEPWARM_PORT"


@pytest.mark.parametrize("name", ["server.prot", "nosuch.port", "port", "", "server.", ".port"])
def test_an_unknown_flag_is_refused_by_name(name: str) -> None:
    error = refusal({name: "1"})
    assert error.key == name
    assert "the command line" in error.problem


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("64KiB", 1 << 16),
        ("2TB", 2 * 10**12),
        ("12B", 12),
        ("12", 12),
        (" 12 ", 12),
        (12, 12),
    ],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert value_of("memory.budget_bytes", text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["8G", "8 GiB RAM", "1.5", "-8GiB", "1e3GiB", "nan", "inf", "", "GiB", "9999999TiB", "٣"],
)
def test_what_is_no_size(text: str) -> None:
    error = refusal(KEEPWARM_MEMORY_BUDGET_BYTES=text)
    assert error.key == "memory.budget_bytes"


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on"])
def test_yes(text: str) -> None:
    assert loaded(KEEPWARM_MODEL_DETERMINISTIC=text).model.deterministic is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off"])
def test_no(text: str) -> None:
    assert loaded(KEEPWARM_MODEL_DETERMINISTIC=text).model.deterministic is False


def test_lists_and_tables_from_the_environment() -> None:
    settings = loaded(
        KEEPWARM_SERVER_ALLOWED_ORIGINS="https://a.example, https://b.example,",
        KEEPWARM_SERVER_API_KEYS="default=a=b, team = c",
        KEEPWARM_SERVER_MODEL_ALIASES="",
    )
    assert settings.server.allowed_origins == ("https://a.example", "https://b.example")
    assert settings.server.api_keys == {"default": "a=b", "team": "c"}
    assert settings.server.model_aliases == ()


def test_lists_and_tables_from_the_file(tmp_path: Path) -> None:
    write(
        tmp_path / "keepwarm.toml",
        '[server]\nallowed_hosts = ["a", "b"]\nlog_format = "json"\n'
        '[server.api_keys]\nteam = "x,y"\n',
    )
    server = loaded().server
    assert server.allowed_hosts == ("a", "b")
    assert server.api_keys == {"team": "x,y"}
    assert server.log_format is LogFormat.JSON


def test_a_whole_number_may_stand_for_seconds() -> None:
    assert value_of("server.heartbeat_s", 3) == 3.0


WRONG: list[tuple[str, object]] = [
    ("server.port", True),
    ("server.port", 8.0),
    ("server.port", "8.5"),
    ("server.port", "yes"),
    ("server.port", ""),
    ("server.port", -1),
    ("server.port", 65536),
    ("server.max_choices", 0),
    ("server.max_messages", 0),
    ("server.max_choices", 1 << 80),
    ("server.heartbeat_s", True),
    ("server.heartbeat_s", "nan"),
    ("server.heartbeat_s", math.inf),
    ("server.deadline_s", math.nan),
    ("server.deadline_s", -1),
    ("server.default_temperature", "inf"),
    ("server.default_temperature", 101),
    ("server.host", ""),
    ("server.host", 8),
    ("server.log_format", "xml"),
    ("server.allowed_hosts", [1]),
    ("server.allowed_hosts", {"a": "b"}),
    ("server.api_keys", ["a"]),
    ("server.api_keys", {"team": 5}),
    ("server.api_keys", {"a b": "key"}),
    ("server.api_keys", {"team": ""}),
    ("server.api_keys", "team"),
    ("server.api_keys", "team=one,team=two"),
    ("server.api_keys", "a=same,b=same"),
    ("server.admins", ["nobody"]),
    ("server.max_head_bytes", 1023),
    ("server.max_connections", 0),
    ("server.head_timeout_s", 0),
    ("server.body_timeout_s", 0),
    ("server.keep_alive_s", 0),
    ("model.deterministic", 1),
    ("model.deterministic", "maybe"),
    ("model.name", " "),
    ("model.dtype", "float64"),
    ("memory.budget_bytes", -1),
    ("memory.budget_bytes", True),
    ("memory.budget_bytes", 1.5),
    ("disk.disk_budget_bytes", 1),
    ("disk.queue_bytes", -1),
    ("engine.max_rows", 0),
    ("engine.max_step_stretch", 1),
    ("engine.max_step_stretch", math.nan),
    ("engine.prefill_chunk_tokens", 257),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_setting_and_where_it_comes_from(name: str, value: object) -> None:
    error = refusal({name: value})
    assert error.key == name
    assert error.problem.endswith("(from the command line)")


@pytest.mark.parametrize(("name", "value"), [case for case in WRONG if isinstance(case[1], str)])
def test_a_wrong_variable_is_named_with_its_setting(name: str, value: str) -> None:
    error = refusal(**{variable_of(name): value})
    assert error.key == name
    assert error.problem.endswith(f"(from the environment's {variable_of(name)})")


def test_a_wrong_value_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "keepwarm.toml", "[engine]\nmax_rows = 0\n")
    error = refusal()
    assert str(error) == f"engine.max_rows: must be at least 1, not 0 (from {path})"


@pytest.mark.parametrize("name", [name for name, _ in all_settings()])
def test_every_default_may_be_given_and_nothing_absurd_passes(name: str) -> None:
    default = default_of(dict(all_settings())[name])
    shown = list(default) if isinstance(default, tuple) else default
    assert value_of(name, shown) == default
    for absurd in (object(), None, b"x", {1: 2}, [[]]):
        assert refusal({name: absurd}).key == name


# -- secrets ---------------------------------------------------------------------------------------


def test_keys_are_the_secret() -> None:
    assert [name for name, setting in all_settings() if is_secret(setting)] == ["server.api_keys"]


@pytest.mark.parametrize(
    "value",
    [
        SECRET,
        f"team:{SECRET}",
        f"default=x,{SECRET}",
        f"team={SECRET},team=x",
        f"a={SECRET},b={SECRET}",
        [SECRET],
        {"team": [SECRET]},
        {"a": SECRET, "b": SECRET},
        {"a b": SECRET},
        {"a": SECRET, "b": ""},
    ],
)
def test_no_error_shows_a_key(value: object) -> None:
    error = refusal({"server.api_keys": value})
    assert SECRET not in "".join(traceback.format_exception(error))


def test_a_key_in_a_broken_file_is_not_shown(tmp_path: Path) -> None:
    for text in (
        f'[server]\napi_keys = "{SECRET}"\n',
        f"[server]\napi_keys = {SECRET}\n",
        f'[server]\napi_keys = {{team = "{SECRET}"\n',
        f'[server.api_keys]\nteam = "{SECRET}"\nteam = "{SECRET}"\n',
        f'api_keys = "{SECRET}"\n',
        f'[server]\napi_key = "{SECRET}"\n',
    ):
        write(tmp_path / "keepwarm.toml", text)
        assert SECRET not in "".join(traceback.format_exception(refusal()))


def test_settings_can_be_printed_without_keys() -> None:
    settings = loaded(KEEPWARM_SERVER_API_KEYS=f"team={SECRET}")
    assert settings.server.api_keys == {"team": SECRET}
    assert SECRET not in repr(settings)
