"""Typed configuration: schema, loading, and the rules between settings."""

from rae_scale.config.load import ConfigError, dump_config, load_config, parse_config
from rae_scale.config.schema import Config

__all__ = ["Config", "ConfigError", "dump_config", "load_config", "parse_config"]
