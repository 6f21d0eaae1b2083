"""`polypeft-serve`: settings, model, HTTP."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import SettingsError

from server import logs
from server.settings import Settings, parse

logger = logging.getLogger(__name__)

T = TypeVar("T")


def main() -> None:
    """Parse the settings and serve until interrupted."""
    try:
        settings = parse()
    except SettingsError as exc:
        sys.exit(f"polypeft-serve: {exc}")
    except ValidationError as exc:
        first = exc.errors(include_input=False)[0]
        flag = "--" + "-".join(str(p) for p in first["loc"]).replace("_", "-")
        sys.exit(f"polypeft-serve: {flag}: {first['msg']}")
    logs.configure(settings.log_format, settings.log_level)
    if settings.check:
        check(settings)
    else:
        serve(settings)


def check(settings: Settings) -> None:
    """Say what would be served and whether it fits; exits with 0 if it does and 1 if not."""
    from peftcore.sources.resolve import ModelSourceError
    from server.api.keys import key_ring
    from server.build import SetupError
    from server.plan import make_plan

    try:
        key_ring(settings)
        plan = make_plan(settings)
    except (SetupError, ModelSourceError, ValueError) as exc:
        sys.exit(f"polypeft-serve: {exc}")
    print(plan)
    sys.exit(0 if plan.fits else 1)


def serve(settings: Settings) -> None:
    """Serve until a signal; exits with a message where that is not possible."""
    # What follows takes seconds to import; --help does not wait for it. A sixth of them was the
    # garbage collector's, which looked again and again through what stays for good.
    gc.disable()
    import torch

    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and os.environ.get("POLYPEFT_OPS") != "triton":
        # torch imports triton wherever it is installed: 80 MB that a CPU has no use for.
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
    from peftcore.memory import bound_malloc
    from peftcore.sources.resolve import ModelSourceError
    from server.api.app import create_app
    from server.api.keys import key_ring
    from server.api.lifecycle import Server
    from server.build import SetupError, build_runtime
    from server.models.probe import UnservableModel

    bound_malloc()
    try:
        ring = key_ring(settings)
    except ValueError as exc:
        sys.exit(f"polypeft-serve: {exc}")
    warn_if_open(settings.host, has_keys=ring is not None)
    app = create_app(partial(then_collect, partial(build_runtime, settings)), settings, ring)
    try:
        Server(app, host=settings.host, port=settings.port).run()
    except KeyboardInterrupt:  # raised again by uvicorn once it has drained
        sys.exit(130)
    failure = app.state.lifecycle.failure
    if isinstance(failure, SetupError | ModelSourceError | UnservableModel):
        sys.exit(f"polypeft-serve: {failure}")
    if failure is not None:
        raise failure


def then_collect(make: Callable[[], T]) -> T:
    """What `make` makes; from then on garbage is collected."""
    made = make()
    gc.freeze()  # of what is here nothing will be garbage: no collection looks at it again
    gc.enable()
    return made


def warn_if_open(host: str, *, has_keys: bool) -> None:
    """Say so where other machines reach the port and need no key."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        is_loopback = host == "localhost"
    if not has_keys and not is_loopback:
        logger.warning(
            "%s is open to other machines and there are no keys: whoever reaches it may ask, "
            "upload and delete; --api-key-file names a file of keys",
            host,
        )


if __name__ == "__main__":
    main()
