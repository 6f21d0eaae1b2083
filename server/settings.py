"""The server's settings, from flags, environment (`POLYPEFT_*`), a YAML file, and defaults."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)
from yaml import YAMLError


def _byte_size(value: object) -> ByteSize:
    """A size as `512MiB`, `1GB` or a number of bytes."""
    try:
        size = TypeAdapter(ByteSize).validate_python(value)
    except ValidationError:
        size = ByteSize(-1)
    if size < 0:
        raise PydanticCustomError("size", "a size is written as 512MiB, 2GiB or in bytes")
    return size


def _byte_size_or_auto(value: object) -> ByteSize | None:
    return None if value is None or value == "auto" else _byte_size(value)


#: A path, in which a shell may not have replaced `~`.
Place = Annotated[Path, AfterValidator(Path.expanduser)]
#: Bytes; defaults are written as a user would write them.
Size = Annotated[ByteSize, PlainValidator(_byte_size, json_schema_input_type=str)]
#: The same, or None for `auto`.
AutoSize = Annotated[
    ByteSize | None, PlainValidator(_byte_size_or_auto, json_schema_input_type=str)
]

#: What --help calls a flag's value, by the name of its type; only times are fractions.
_VALUES = {
    "Path": "PATH", "str": "TEXT", "int": "NUMBER", "float": "SECONDS", "ByteSize": "SIZE",
    "SecretStr": "KEY",
}  # fmt: skip


class Settings(BaseSettings):
    """
    Serve one base model and many adapters over an OpenAI-style HTTP API.

    Sizes are written as 512MiB, 2GiB or in bytes, times in seconds. Every flag can also be set by
    the environment, as POLYPEFT_MAX_NUM_SEQS, and in the file of --config, as max_num_seqs.
    """

    model_config = SettingsConfigDict(
        env_prefix="POLYPEFT_",
        cli_prog_name="polypeft-serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        frozen=True,
    )

    config: Place | None = Field(
        None, description="YAML file of settings; flags and environment go before it"
    )
    check: bool = Field(
        False, description="say what would be served and whether it fits, and serve nothing"
    )
    model: str | None = Field(
        None,
        description="hub id, folder, GGUF file or pypi:PACKAGE; by default SmolLM2-135M-Instruct",
    )
    served_model_name: str | None = Field(
        None, description="the base model's name in requests; by default the model's own"
    )
    quantization: Literal["nf4", "int8", "none"] = Field(
        "int8", description="how the base model's linear layers are kept"
    )
    activations: Literal["auto", "float", "int16", "int8"] = Field(
        "auto",
        description="what a quantized layer's inputs are rounded to, row by row; auto: int16 where "
        "the CPU multiplies that faster",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    num_threads: int | None = Field(
        None, gt=0, description="threads that compute on a CPU; by default one a core"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    data_dir: Place = Field(
        Path("~/.local/share/polypeft"), description="where uploaded adapters are kept"
    )
    preload: Place | None = Field(
        None, description="register each adapter folder in this folder at start, by its name"
    )
    max_num_seqs: int = Field(32, gt=0, description="most sequences in one step")
    max_num_batched_tokens: int = Field(
        512, gt=0, description="most tokens in one step, prompts and decodes together"
    )
    max_prefill_tokens: int | None = Field(
        None,
        gt=0,
        description="most prompt tokens in a step that decodes too, so that prompts and texts to "
        "classify slow no running answer by more; by default what max_num_batched_tokens leaves",
    )
    max_model_len: int | None = Field(
        None, gt=0, description="longest context in tokens; by default the model's, if it fits"
    )
    block_size: int = Field(16, gt=0, description="tokens in a block of the KV cache")
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="how keys and values are kept; auto: float16 beside a quantized base on a CPU "
        "with kernels, else as the model computes",
    )
    adapter_dtype: Literal["auto", "float", "int8"] = Field(
        "auto",
        description="how low-rank updates' factors are kept; float: as they are, in half precision "
        "where that holds them; int8: rounded, with a scale for each rank; auto: int8 beside a "
        "quantized base on a CPU with kernels, else float",
    )
    kv_memory: AutoSize = Field(
        None,
        description="memory of the KV cache; auto, the default: on a GPU what base and adapters "
        "leave of it, else 1GiB",
    )
    cuda_graphs: bool = Field(
        True,
        description="on a GPU, capture decode steps as CUDA graphs at start, where model and "
        "kernels allow it",
    )
    cuda_graph_max_seqs: int | None = Field(
        None,
        gt=0,
        description="most sequences of a captured step; by default max_num_seqs. Fewer take less "
        "memory and time at start",
    )
    adapter_memory: Size = Field(  # type: ignore[assignment]
        "512MiB", description="device memory that resident adapters share"
    )
    adapter_host_memory: Size | None = Field(
        None,
        description="host memory for adapters that are ready to be copied in; by default 512MiB "
        "beside a GPU, and none on a CPU, where the adapter memory is host memory",
    )
    max_upload: Size = Field(  # type: ignore[assignment]
        "256MiB", description="largest upload of one adapter"
    )
    lora_root: Place | None = Field(
        None,
        description="folder whose adapters /v1/load_lora_adapter may name by path; by default none",
    )

    api_key: SecretStr | None = Field(
        None,
        description="key that requests must bear; better in POLYPEFT_API_KEY, where no list of "
        "processes shows it",
    )
    api_key_file: Place | None = Field(
        None, description="file of such keys, one a line; lines that begin with # are comments"
    )
    max_waiting: int = Field(
        1024, ge=0, description="most sequences that wait; requests over it are answered 429"
    )
    request_timeout: float | None = Field(
        600,
        gt=0,
        description="longest time from a request's arrival to the end of its answer; null: no end",
    )
    drain_timeout: float = Field(
        30, ge=0, description="how long running requests may go on after SIGTERM"
    )
    log_format: Literal["text", "json"] = Field("text", description="how log lines are written")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls)


class _ConfigFile(PydanticBaseSettingsSource):
    """The YAML file that flags or environment name, which go before it."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # `__call__` gives all of them

    def __call__(self) -> dict[str, Any]:
        """Raises SettingsError for a file that cannot be read and for a key that is no setting."""
        path = self.current_state.get("config")
        if path is None:
            return {}
        path = Path(path).expanduser()
        if not path.is_file():
            raise SettingsError(f"--config: there is no file {path}")
        try:
            values = YamlConfigSettingsSource(self.settings_cls, yaml_file=path).yaml_data
        except (OSError, UnicodeDecodeError, YAMLError) as exc:
            raise SettingsError(f"{path}: {exc}") from exc
        except (TypeError, ValueError):
            raise SettingsError(f"{path}: must map names of settings to values") from None
        for key in values:
            if key not in self.settings_cls.model_fields or key == "config":
                raise SettingsError(f"{path}: {key}: there is no such setting")
        return values


def parse(flags: Sequence[str] | None = None) -> Settings:
    """The settings by `flags`, by default the process's own; --help ends the process.

    Raises:
        SettingsError: see `_ConfigFile`. ValidationError: a value is not one.
    """
    source: CliSettingsSource[Settings] = CliSettingsSource(
        Settings, add_argument_method=_add_argument
    )
    given = None if flags is None else list(flags)
    return CliApp.run(Settings, cli_args=given, cli_settings_source=source)


def _add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Any:
    """Where None is the default the description says what it means."""
    options["help"] = options["help"].removesuffix(" (default: null)")
    if "metavar" in options:
        options["metavar"] = _VALUES.get(options["metavar"], options["metavar"])
    return parser.add_argument(*names, **options)
