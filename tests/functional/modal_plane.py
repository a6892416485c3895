"""Fixtures: Modal's genuine SDK against the control plane on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from comfy_executors.workers.modal_backend import ModalPlaces

if TYPE_CHECKING:
    from modal_control_plane import ControlPlane

# With these the control plane is known to work; of others it need not know the protocol.
_KNOWN = ("1.6.",)


@pytest.fixture(scope="session")
def session_plane() -> Iterator[ControlPlane]:
    modal: Any = pytest.importorskip("modal", reason="Modal's SDK needs Python 3.10")
    try:
        from modal_control_plane import ControlPlane

        started = ControlPlane().start()
    except (ImportError, AttributeError) as error:
        _skip_unless_known(modal, error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODAL_SERVER_URL", started.url)
        patch.setenv("MODAL_TOKEN_ID", "ak-plane")
        patch.setenv("MODAL_TOKEN_SECRET", "as-plane")
        patch.setenv("MODAL_CONFIG_PATH", "/nonexistent")
        try:
            modal.Dict.from_name("probe", create_if_missing=True).get("nothing")
        except modal.exception.Error as error:
            _skip_unless_known(modal, error)
        yield started
        # The SDK keeps one client a process, and it is this one's.
        modal.Client.from_env().close()
    started.close()


def _skip_unless_known(modal: Any, error: Exception) -> None:
    if modal.__version__.startswith(_KNOWN):
        raise error
    pytest.skip(f"Modal's SDK {modal.__version__} speaks another protocol: {error}")


@pytest.fixture
def plane(session_plane: ControlPlane) -> ControlPlane:
    session_plane.reset()
    return session_plane


@pytest.fixture
def places(plane: ControlPlane) -> Iterator[ModalPlaces]:
    yield ModalPlaces("test-app")
    plane.join()
