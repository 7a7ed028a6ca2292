"""The daemon's configuration: one declaration gives types, bounds, defaults, variables and documentation.

Layers, later ones win: defaults, the TOML file, `POSTCOPYD_*` variables, the command line. Each is checked by
itself, so that an error names where the value came from. Variables that name no key are left alone: container
platforms invent `POSTCOPYD_PORT` and the like for a service called postcopyd.
"""

from __future__ import annotations

import difflib
import functools
import os
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .arguments import check_id, check_socket_path, parse_endpoint
from .errors import Code, ConfigError
from .priority import NICE
from .status import Limits
from .units import GIB, KIB, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ENV_PREFIX = "POSTCOPYD_"
ENVIRONMENT = "environment"
CONTROL_SOCKET_NAME = "control.sock"
MAX_CONFIG_BYTES = 1 << 20

WINDOW_BYTES = 1 << 20
"""Enough for 1 GiB/s at 1 ms, little enough to stay in a processor's cache."""

_SIZE = {"unit": "size"}

Table = dict[str, object]

Seconds = Annotated[float, Meta(gt=0, le=86400)]


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files in PEM."""

    ca: Annotated[str, Meta(description="CA that signed the page sources' certificates; empty: no TLS.")] = ""
    cert: Annotated[str, Meta(description="This host's certificate, for sources that ask for one.")] = ""
    key: Annotated[str, Meta(description="The key of `cert`.")] = ""


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a migration gets when `prepare` names no limits."""

    push_rate: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 50,
            extra=_SIZE,
            description="Background push, bytes a second, as `100M`; 0: unlimited. Demand is never limited.",
        ),
    ] = 0
    weight: Annotated[int, Meta(ge=1, le=1000, description="Share among the migrations of this daemon.")] = (
        100
    )


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys. `load_config` fills in `state_dir` and `control`, which depend on the environment."""

    state_dir: Annotated[
        str,
        Meta(
            description="Sockets and session records. Empty: `$RUNTIME_DIRECTORY` or `$STATE_DIRECTORY` (set "
            "by systemd), /run/postcopyd for root, else `$XDG_RUNTIME_DIR`/postcopyd or /tmp/postcopyd-UID."
        ),
    ] = ""
    control: Annotated[str, Meta(description="Control socket. Empty: control.sock in `state_dir`.")] = ""
    transport: Annotated[
        Literal["native", "grpcio"],
        Meta(description="Implementation of the page stream; the wire is the same."),
    ] = "native"
    default_socket: Annotated[
        str, Meta(description="Socket for VMMs that no `prepare` announced; empty: none, or systemd's.")
    ] = ""
    default_source: Annotated[
        list[str],
        Meta(max_length=16, description="HOST:PORT of page sources for the default socket, tried in order."),
    ] = []
    default_image: Annotated[str, Meta(description="Image id at `default_source`.")] = ""
    http: Annotated[
        str, Meta(description="HOST:PORT of /healthz, /readyz and /metrics; empty: off. Unauthenticated.")
    ] = "127.0.0.1:9464"
    push_window: Annotated[
        int,
        Meta(
            ge=64 * KIB,
            le=GIB,
            extra=_SIZE,
            description="Most bytes of the push on their way for one migration, four times as many while all is zero; "
            "more for links that are long and fat.",
        ),
    ] = WINDOW_BYTES
    nice: Annotated[
        int,
        Meta(
            ge=-20,
            le=19,
            description="Scheduling priority, where permitted: busy guests must not keep waiting ones from their pages.",
        ),
    ] = NICE
    vmm_socket_mode: Annotated[
        str,
        Meta(
            pattern="^0[0-7]{3}$",
            description="Permissions of the sockets for VMMs: who can write can hand memory over.",
        ),
    ] = "0600"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged.")
    ] = "info"
    max_migrations: Annotated[int, Meta(ge=1, le=4096, description="Most migrations at a time.")] = 64
    connect_timeout_s: Annotated[Seconds, Meta(description="Time for one connection to a page source.")] = 5.0
    silent_after_s: Annotated[
        Seconds, Meta(description="A source with unanswered requests and no data for so long is given up.")
    ] = 10.0
    handoff_timeout_s: Annotated[
        Seconds, Meta(description="Time from a VMM's connection to its complete hand-off.")
    ] = 5.0
    store_max: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="Descriptors that the service manager keeps for us: FileDescriptorStoreMax of the unit. "
            "0: none, unless it says so itself ($FDSTORE).",
        ),
    ] = 0
    standby: Annotated[
        bool,
        Meta(
            description="Keep a process that has everything loaded and goes on at once after a crash, for 40 MiB of "
            "memory. Needs systemd: set in the unit."
        ),
    ] = False
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig = TlsConfig()

    def default_limits(self) -> Limits:
        return Limits(push_rate=self.limits.push_rate, weight=self.limits.weight)


class Key(msgspec.Struct, frozen=True):
    """One leaf of the configuration."""

    name: str
    type: str
    default: object
    description: str
    is_size: bool
    is_list: bool

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.replace(".", "_").upper()


def default_state_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Return where sockets live when nothing is configured.

    The runtime directory comes first: a session means nothing after a reboot, when the VMM's memory is gone.
    """
    for variable in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY"):
        # systemd.exec(5): several directories are separated by colons.
        if first := environ.get(variable, "").split(":")[0]:
            return first
    if os.geteuid() == 0:
        return "/run/postcopyd"
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/postcopyd"
    return f"/tmp/postcopyd-{os.geteuid()}"


def default_control(environ: Mapping[str, str] = os.environ) -> str:
    """Return the control socket that a client tries when it was given none."""
    if named := environ.get(ENV_PREFIX + "CONTROL"):
        return named
    state_dir = environ.get(ENV_PREFIX + "STATE_DIR") or default_state_dir(environ)
    return f"{state_dir}/{CONTROL_SOCKET_NAME}"


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> DaemonConfig:
    """Return the checked configuration, with `state_dir` and `control` filled in.

    Args:
        path: TOML file; None: none.
        overrides: from the command line, by key; nested tables as mappings.
    Raises:
        ConfigError: CONFIG_UNREADABLE or CONFIG_INVALID; the message names the layer and the key.
    """
    layers: list[tuple[str, Table]] = []
    if path is not None:
        layers.append((os.fspath(path), _read_toml(Path(path))))
    layers.append((ENVIRONMENT, _from_environ(environ)))
    layers.append(("command line", dict(overrides or {})))
    merged: Table = {}
    for origin, layer in layers:
        _check_layer(origin, layer)
        for name, value in layer.items():
            before = merged.get(name)
            merged[name] = (
                {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
            )
    # Each layer passed its own check; only the environment's strings still need to become numbers.
    config = msgspec.convert(merged, DaemonConfig, strict=False)
    state_dir = config.state_dir or default_state_dir(environ)
    config = msgspec.structs.replace(
        config, state_dir=state_dir, control=config.control or f"{state_dir}/{CONTROL_SOCKET_NAME}"
    )
    _check_together(config)
    return config


@functools.cache
def keys() -> tuple[Key, ...]:
    """Every leaf in the order of declaration."""
    return tuple(_leaves(DaemonConfig, ""))


def _leaves(struct: type[msgspec.Struct], prefix: str) -> Iterator[Key]:
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from _leaves(hint, f"{prefix}{field.name}.")
            continue
        plain, *metas = get_args(hint)
        described = {
            k: v for meta in metas for k in ("description", "extra") if (v := getattr(meta, k)) is not None
        }
        is_size = described.get("extra") == _SIZE
        yield Key(
            name=prefix + field.name,
            type="size" if is_size else _type_name(plain),
            default=field.default if field.default_factory is msgspec.NODEFAULT else [],
            description=described["description"],
            is_size=is_size,
            is_list=get_origin(plain) is list,
        )


def render_markdown() -> str:
    """Return all keys as a Markdown table, for docs/operations.md."""
    lines = ["| key | type | default | meaning | variable |", "|---|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.type.replace('|', '&#124;')} | `{_toml(key.default)}` "
        f"| {key.description} | `{key.variable}` |"
        for key in keys()
    ]
    return "\n".join(lines) + "\n"


def render_example() -> str:
    """Return a TOML file with every key commented out at its default: deploy/postcopyd.toml."""
    lines = ["# postcopyd's configuration. Every key is shown with its default."]
    table = ""
    for key in keys():
        head, _, name = key.name.rpartition(".")
        if head != table:
            table = head
            lines += ["", f"[{table}]"]
        lines += ["", *textwrap.wrap(key.description, 110, initial_indent="# ", subsequent_indent="# ")]
        lines += [f"# Type: {key.type}. Variable: {key.variable}", f"#{name} = {_toml(key.default)}"]
    return "\n".join(lines) + "\n"


def _read_toml(path: Path) -> Table:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(Code.CONFIG_UNREADABLE, f"{path} cannot be read: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(Code.CONFIG_INVALID, f"{path} is longer than {MAX_CONFIG_BYTES} bytes")
    try:
        return tomllib.loads(text.decode())
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(Code.CONFIG_INVALID, f"{path} is not TOML: {error}") from error


def _from_environ(environ: Mapping[str, str]) -> Table:
    layer: Table = {}
    for key in keys():
        if (text := environ.get(key.variable)) is not None:
            holder, name = _holder(layer, key)
            holder[name] = [part for part in text.split(",") if part] if key.is_list else text
    return layer


def _holder(layer: Table, key: Key) -> tuple[Table, str]:
    """Return the table that holds `key`, made if absent, and the key's name in it."""
    head, _, name = key.name.rpartition(".")
    inner = layer.setdefault(head, {}) if head else layer
    # A table given as something else is reported by the type check.
    return (inner if isinstance(inner, dict) else {}), name


def _check_layer(origin: str, layer: Table) -> None:
    """Check one layer alone, turning sizes into bytes; all keys have defaults, so each layer is a whole."""
    _check_names(origin, layer, DaemonConfig, "")
    for key in keys():
        holder, name = _holder(layer, key)
        if key.is_size and isinstance(text := holder.get(name), str):
            holder[name] = _named(origin, key.name, parse_size, text)
    try:
        config = msgspec.convert(layer, DaemonConfig, strict=origin != ENVIRONMENT)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        raise ConfigError(Code.CONFIG_INVALID, f"{origin}: {place.rstrip('`')}: {what}") from error
    for source in config.default_source:
        _named(origin, "default_source", parse_endpoint, source)
    if config.http:
        _named(origin, "http", lambda text: parse_endpoint(text, port_zero=True), config.http)
    if config.default_image:
        _named(origin, "default_image", check_id, config.default_image)
    for name, path in (("control", config.control), ("default_socket", config.default_socket)):
        if path:
            _named(origin, name, check_socket_path, path)
    if config.state_dir:
        _named(
            origin,
            "state_dir",
            lambda text: check_socket_path(f"{text}/{CONTROL_SOCKET_NAME}"),
            config.state_dir,
        )


def _check_names(origin: str, table: Table, struct: type[msgspec.Struct], prefix: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for name, value in table.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(Code.CONFIG_INVALID, f"{origin}: {prefix}{name}: unknown key{hint}")
        inner = fields[name]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _check_names(origin, value, inner, f"{prefix}{name}.")


def _named(origin: str, key: str, check: Callable[[str], object], value: str) -> object:
    try:
        return check(value)
    except ConfigError as error:
        raise ConfigError(Code.CONFIG_INVALID, f"{origin}: {key}: {error.message}") from error


def _check_together(config: DaemonConfig) -> None:
    """Check what only the merged layers can show."""
    if bool(config.default_source) != bool(config.default_image):
        raise ConfigError(
            Code.CONFIG_INVALID,
            "default_source and default_image: name both or neither, as one is no use alone",
        )
    if bool(config.tls.cert) != bool(config.tls.key):
        raise ConfigError(Code.CONFIG_INVALID, "tls.cert and tls.key: name both or neither")
    if config.tls.cert and not config.tls.ca:
        raise ConfigError(
            Code.CONFIG_INVALID, "tls.ca: must be named when tls.cert is, as without it there is no TLS"
        )


def _type_name(plain: object) -> str:
    if get_origin(plain) is Literal:
        return "|".join(get_args(plain))
    if get_origin(plain) is list:
        return f"list of {_type_name(get_args(plain)[0])}"
    return {str: "text", int: "integer", float: "number", bool: "true|false"}[plain]  # type: ignore[index]


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()  # the same notation for text, numbers and lists
