"""Sockets: the listening one, the number of open ones, and the kernel's buffers of unread data."""

import asyncio
import resource
import socket
import sys
from contextlib import suppress

from clip_har_jax.errors import UserError
from serving.settings import Settings
from serving.telemetry import log

SEGMENT_BYTES = 8960  # a jumbo frame's; on loopback a segment has 65,483 bytes, and the first buffer holds ten
HEAD_BUFFER_BYTES = 32_768  # for unread headers; the kernel doubles it
SO_BUF_LOCK = 72  # Linux 5.14 and later; Python's socket module lacks the name
OTHER_FILES = 200  # open files other than connections: models, decoders, libraries


def listen(settings: Settings) -> socket.socket:
    """Return a bound socket.

    Raises:
      UserError: the address is in use, or isn't one of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_MAXSEG"):  # else a local client's kernel sends megabytes before a refusal can reach it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise UserError(f"{settings.host}:{settings.port}: can't listen there ({error.strerror})") from error
    listener.set_inheritable(True)
    return listener


def bound_unread(transport: asyncio.Transport, bounded: bool) -> None:
    """Limit the kernel's buffer of a connection's unread data, or leave it to the kernel, as for a body."""
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None:
        return
    with suppress(OSError):  # a kernel that couldn't revert it
        if bounded:
            connection.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)  # fails if it can't be reverted
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HEAD_BUFFER_BYTES)
        else:
            connection.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)


def allow_open_files(max_connections: int) -> None:
    """Raise the soft limit on open files to the number of connections; log it if the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    if raised < needed:
        fields = {"open_files": raised, "needed": needed}
        log.warning("fewer files may be open than HAR_MAX_CONNECTIONS needs", extra={"fields": fields})
