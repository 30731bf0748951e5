"""The entry point for torchrun: read the options, then run this rank until the job ends.

torchrun --nproc-per-node 8 -m serve.launch --model M
"""

from __future__ import annotations

import os
import socket
import sys

from serve.config.server import ConfigError, ServerConfig, parse_args
from serve.runtime.logs import start_logging
from serve.runtime.shutdown import die_with_parent, exit_now
from serve.topology import RankInfo, read_rank_info


def main() -> None:
    """Start this rank, after checking the options.

    Heavy modules are imported after the check, so that a wrong option is reported at once.
    """
    die_with_parent()
    rank_info = read_rank_info(os.environ)
    if rank_info.rank != 0 and {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(0)  # rank 0 prints the help
    config, listener = _prepare(rank_info)
    start_logging(config, rank_info)
    import uvloop

    from serve.runtime.server import serve_rank

    exit_now(uvloop.run(serve_rank(config, rank_info, listener)))


def _prepare(rank_info: RankInfo) -> tuple[ServerConfig, socket.socket | None]:
    """Return the configuration, and on rank 0 the listening socket.

    A wrong option ends the process. Most are wrong on every rank, and only rank 0 prints them. So
    that it can also print an error that another rank alone has found, that rank reports it.
    """
    try:
        config = parse_args(sys.argv[1:], rank_info.world_size)
        return config, _listen(config) if rank_info.rank == 0 else None
    except ConfigError as error:
        if rank_info.rank == 0:
            print(f"serve: error: {error}", file=sys.stderr)
        else:
            from serve.runtime.join import report_start_error

            report_start_error(rank_info, str(error))
        sys.exit(2)


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {reason}") from None


if __name__ == "__main__":
    main()
