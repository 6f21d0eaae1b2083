"""`polypeft-serve`: settings, model, HTTP."""

from __future__ import annotations

import logging
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.settings import Settings

#: How long running requests may go on after a signal to stop.
_SECONDS_TO_FINISH = 10


def main() -> None:
    """Parse the flags and serve until interrupted."""
    try:
        settings = CliApp.run(Settings)
    except ValidationError as exc:
        first = exc.errors()[0]
        flag = "--" + "-".join(str(p) for p in first["loc"]).replace("_", "-")
        sys.exit(f"polypeft-serve: {flag}: {first['msg']}")
    # What follows takes seconds to import; --help does not wait for it.
    from peftcore.memory import bound_malloc, trim_malloc
    from peftcore.sources.resolve import ModelSourceError
    from server.api.app import create_app
    from server.build import SetupError, build_runtime, preload
    from server.models.probe import UnservableModel

    bound_malloc()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        runtime = build_runtime(settings)
        if settings.preload is not None:
            preload(runtime, settings.preload)
    except (SetupError, ModelSourceError, UnservableModel) as exc:
        sys.exit(f"polypeft-serve: {exc}")
    app = create_app(runtime)
    trim_malloc()  # what loading took for a time lies between what stays
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )


if __name__ == "__main__":
    main()
