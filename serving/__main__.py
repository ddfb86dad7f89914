"""Serve exported models over HTTP and WebSockets.

  python -m serving --model=runs/demo/export
  curl -F image=@photo.jpg http://127.0.0.1:8000/v1/predict
  python -m serving --new_key=alice          prints a key for alice, and its line for HAR_API_KEYS

All other settings are HAR_ variables (--print-settings lists them, e.g. HAR_MAX_BODY_BYTES=10000000). After SIGTERM,
requests in flight are finished, and the exit code is 0. SIGHUP reads the models' folders again. A mistake in the
settings exits with 2.
"""

from typing import TYPE_CHECKING, Any

from clip_har_jax import cli
from clip_har_jax.errors import UserError

if TYPE_CHECKING:
    from serving.settings import Settings

FLAGS = ("model", "name", "host", "port", "workers", "models_dir")


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="PATH", help="an exported folder, or one format in it, e.g. --model=runs/demo/export")
    add("--name", metavar="NAME", help="the model's name in addresses, e.g. --name=har (default)")
    add("--host", metavar="ADDRESS", help="address to listen on; for other machines --host=0.0.0.0 (needs keys)")
    add("--port", type=int, metavar="N", help="e.g. --port=8000 (default); 0: any free one")
    add("--workers", type=int, metavar="N", help="serving processes, each with all models, e.g. --workers=2")
    add("--models_dir", metavar="DIR", help="folder of models to load at run time, e.g. --models_dir=models")
    add(
        "--print-settings", action="store_true", help="show all settings as JSON, secrets masked, e.g. --print-settings"
    )
    add("--new_key", metavar="NAME", help="make an API key, e.g. --new_key=alice")
    add(
        "--scopes", default="use", metavar="SCOPES", help="of the new key: use, metrics, admin, e.g. --scopes=use+admin"
    )
    arguments = parser.parse_args()
    if arguments.new_key is not None:
        return _print_key(arguments.new_key, arguments.scopes)
    settings = make_settings({name: getattr(arguments, name) for name in FLAGS})
    if arguments.print_settings:
        import json

        print(json.dumps(settings.shown(), indent=2))
        return 0
    if not settings.all_models:
        raise UserError("name a model, e.g. --model=runs/demo/export")
    from serving.server import serve

    return serve(settings)


def make_settings(flags: dict[str, Any]) -> "Settings":
    """Return the environment's settings, overridden by the given flags.

    Raises:
      UserError: an invalid value, or an unknown HAR_ variable.
    """
    import os

    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from clip_har_jax.errors import nearest
    from serving.security import parse_keys
    from serving.settings import Settings

    known = [f"HAR_{name.upper()}" for name in Settings.model_fields]
    if unknown := [name for name in os.environ if name.startswith("HAR_") and name not in known]:
        raise UserError(f"{unknown[0]}: no such setting; {nearest(unknown[0], known)}")
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        raise UserError(f"{error}; write JSON, e.g. HAR_ALLOWED_ORIGINS='[\"https://example.org\"]'") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = "HAR_" + "_".join(str(part) for part in first["loc"][:1]).upper() + ": " if first["loc"] else ""
        raise UserError(where + first["msg"].removeprefix("Value error, ")) from error
    parse_keys(settings.api_keys.get_secret_value())
    return settings


def _print_key(name: str, scopes: str) -> int:
    from serving.security import new_key, parse_keys

    key, line = new_key(name, scopes.split("+"))
    parse_keys(line)
    print(f"key, for {name} alone; it isn't kept: {key}\nfor HAR_API_KEYS: {line}")
    return 0


if __name__ == "__main__":
    cli.run(main)
