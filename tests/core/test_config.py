"""The configuration: layers, bounds, and errors an operator can act on."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from postcopyd import log
from postcopyd.arguments import check_id, check_socket_path, parse_endpoint
from postcopyd.config import (
    DaemonConfig,
    default_control,
    default_state_dir,
    keys,
    load_config,
    render_example,
    render_markdown,
)
from postcopyd.errors import Code, ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "postcopyd.toml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "postcopyd.toml"
    path.write_text(text)
    return path


def test_later_layers_win(tmp_path: Path) -> None:
    path = written(tmp_path, 'log_level = "error"\nmax_migrations = 3\nhttp = ""\n[limits]\nweight = 7\n')
    environ = {
        "POSTCOPYD_MAX_MIGRATIONS": "4",
        "POSTCOPYD_HTTP": "127.0.0.1:1",
        "POSTCOPYD_LIMITS_PUSH_RATE": "1M",
    }
    config = load_config(path, {"http": "127.0.0.1:2"}, environ)
    assert (config.log_level, config.max_migrations, config.http) == ("error", 4, "127.0.0.1:2")
    assert (config.limits.weight, config.limits.push_rate) == (7, 1 << 20)


def test_sizes_may_be_written_as_people_do(tmp_path: Path) -> None:
    assert (
        load_config(written(tmp_path, '[limits]\npush_rate = "100M"'), environ={}).limits.push_rate
        == 100 << 20
    )


def test_lists_in_variables_are_separated_by_commas() -> None:
    environ = {"POSTCOPYD_DEFAULT_SOURCE": "a:1,[::1]:2", "POSTCOPYD_DEFAULT_IMAGE": "vm-1"}
    assert load_config(environ=environ).default_source == ["a:1", "[::1]:2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contrl = '/x'", "contrl: unknown key; did you mean control?"),
        ("[limits]\npush_rat = 1", "limits.push_rat: unknown key; did you mean limits.push_rate?"),
        ("max_migrations = 'many'", "max_migrations: Expected `int`, got `str`"),
        ("max_migrations = 0", "max_migrations: Expected `int` >= 1"),
        ("max_migrations = '64'", "max_migrations: Expected `int`, got `str`"),
        ("limits = 3", "limits: Expected `object`, got `int`"),
        ("transport = 'carrier pigeon'", "transport: Invalid enum value"),
        ("[limits]\npush_rate = '100 parsecs'", "limits.push_rate: '100 parsecs' is not a size"),
        ("default_source = ['nowhere']", "default_source: 'nowhere' is not HOST:PORT"),
        ("default_source = ['a:1']", "default_source and default_image: name both"),
        ("default_image = '../x'", "default_image: '../x' is not an id"),
        ("control = 'relative'", "control: 'relative' is not an absolute path"),
        ("connect_timeout_s = 0", "connect_timeout_s: Expected `float` > 0"),
        ("[tls]\ncert = 'c'", "tls.cert and tls.key"),
        ("[tls]\ncert = 'c'\nkey = 'k'", "tls.ca"),
        ("= 1", "is not TOML"),
        ("# " + "x" * (1 << 20), "longer than"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), environ={})
    assert caught.value.code is Code.CONFIG_INVALID
    assert said in caught.value.message


def test_the_layer_of_a_mistake_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "max_migrations = 'x'")
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path, environ={})
    with pytest.raises(ConfigError, match="environment: max_migrations"):
        load_config(environ={"POSTCOPYD_MAX_MIGRATIONS": "x"})
    with pytest.raises(ConfigError, match="command line: control"):
        load_config(overrides={"control": "x"}, environ={})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read: No such file") as caught:
        load_config(tmp_path / "absent.toml", environ={})
    assert caught.value.code is Code.CONFIG_UNREADABLE
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "binary.toml", environ={})


def test_variables_that_name_no_key_are_left_alone() -> None:
    assert load_config(environ={"POSTCOPYD_PORT_9464_TCP": "tcp://10.0.0.1:9464"}).max_migrations == 64


def test_the_control_socket_follows_the_state_directory() -> None:
    config = load_config(overrides={"state_dir": "/srv/p"}, environ={})
    assert config.control == "/srv/p/control.sock"
    assert default_control({"POSTCOPYD_STATE_DIR": "/srv/p"}) == config.control
    assert default_control({"POSTCOPYD_CONTROL": "/c"}) == "/c"


def test_the_service_managers_directories_come_first() -> None:
    both = {
        "RUNTIME_DIRECTORY": "/run/a:/run/b",
        "STATE_DIRECTORY": "/var/lib/a",
        "XDG_RUNTIME_DIR": "/run/user/7",
    }
    assert default_state_dir(both) == "/run/a"
    assert default_state_dir({"STATE_DIRECTORY": "/var/lib/a"}) == "/var/lib/a"


def test_an_ordinary_users_directory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_state_dir({"XDG_RUNTIME_DIR": "/run/user/1000"}) == "/run/user/1000/postcopyd"
    assert default_state_dir({}) == "/tmp/postcopyd-1000"


def test_the_example_file_is_in_step_with_the_code(tmp_path: Path) -> None:
    assert EXAMPLE.read_text() == render_example(), "write it again: make docs"
    uncommented = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line
        for line in render_example().splitlines()
    )
    assert load_config(written(tmp_path, uncommented), environ={}) == load_config(environ={})


def test_every_key_is_documented() -> None:
    table = render_markdown()
    assert {key.name.split(".")[0] for key in keys()} == set(DaemonConfig.__struct_fields__)
    for key in keys():
        assert key.description
        assert f"| `{key.name}` |" in table


@pytest.mark.parametrize("text", ["", "a b", "a/b", "..", "x" * 129, "a\n", "ü"])
def test_an_unsafe_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        check_id(text)
    assert check_id("vm-1.A_b") == "vm-1.A_b"


def test_endpoints() -> None:
    assert parse_endpoint("host:1") == ("host", 1)
    assert parse_endpoint("[fe80::1%eth0]:65535") == ("fe80::1%eth0", 65535)
    assert parse_endpoint("h:0", port_zero=True) == ("h", 0)
    for bad in ("host", "host:", ":1", "h:0", "h:65536", "::1:5", "h:1 ", "h:١", "unix:/x"):
        with pytest.raises(ConfigError):
            parse_endpoint(bad)


def test_a_socket_path_must_fit_the_kernels_address() -> None:
    assert check_socket_path("/" + "x" * 106)
    for bad in ("x", "", "/" + "x" * 107, "/a\0b"):
        with pytest.raises(ConfigError):
            check_socket_path(bad)


def test_logs_are_one_json_object_a_line() -> None:
    out = io.StringIO()
    log.configure("info", out)
    structlog.get_logger("x").info("session.began", pages=3)
    structlog.get_logger("x").debug("session.detail")
    logging.getLogger("grpc").error("broken %s", "pipe")
    ours, theirs = (json.loads(line) for line in out.getvalue().splitlines())
    assert (ours["event"], ours["pages"], ours["level"]) == ("session.began", 3, "info")
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"]) == ("broken pipe", "error")
