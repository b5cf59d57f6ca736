"""`surgery kernels`: build the native kernels ahead of time, or say which ones are there."""

from __future__ import annotations

import typer

kernels = typer.Typer(help="Native kernels: build them ahead of time, or see what is there.")


def register(app: typer.Typer) -> None:
    app.add_typer(kernels, name="kernels")


@kernels.command()
def build(
    everything: bool = typer.Option(False, "--all", help="Also CUDA, for all architectures and as PTX."),
) -> None:
    """Compile the CPU kernels (and with --all the CUDA ones) into the cache; print where they lie."""
    from surgery.codecs.compile import cpu_library, cuda_library

    typer.echo(cpu_library())
    if everything:
        typer.echo(cuda_library())


@kernels.command()
def status() -> None:
    """Which path computes here, and with what it was compiled."""
    import torch

    from surgery.codecs import native

    found = [native.cpu()]
    if torch.cuda.is_available():
        found.append(native.cuda(torch.cuda.get_device_capability()))
    for each in found:
        typer.echo(": ".join(word for word in (each.path, each.reason or each.compiler) if word))
