"""The ways in which Modal's edge can be told to misbehave."""

from __future__ import annotations

from collections.abc import Callable

from comfy_executors.devserver.faults import Faults, Rule

_MISSING = "Missing request, possibly due to expiry or cancellation"
_SPEND_LIMIT = "Webhook failed: workspace billing cycle spend limit reached"
_CRASHED = "internal error: function was terminated by signal"


class ModalFaults(Faults):
    """Misbehaviour that can be switched on and off at any time, from any thread.

    `fail`, `delay`, `reset_before`, `reset_after`, `truncate` and `refuse_connections` are those
    of the dev server; paths are those of the app, `/v1/jobs`, `/v1/jobs/*/outputs/*`. So a submit
    that never arrived is `reset_before("POST", "/v1/jobs")`, and one whose answer was lost
    `reset_after("POST", "/v1/jobs")`. What the dev server does to websockets means nothing here.
    """

    def __init__(self, on_refuse: Callable[[bool], None]) -> None:
        super().__init__(on_refuse)
        self._run_twice: list[Rule] = []
        self._redirects: list[Rule] = []

    def redirect(self, method: str, path: str, times: int | None = 1) -> None:
        """Answer 303 at once, as while a container starts; the app gets the request all the same.

        The first GET of the result URL is answered as if nothing had been.
        """
        self._redirects.append(Rule("redirect", method.upper(), path, times))

    def run_twice(self, method: str, path: str, times: int | None = 1) -> None:
        """Give the app a request a second time, as when its container died; the second answers."""
        self._run_twice.append(Rule("run_twice", method.upper(), path, times))

    def lose_body(self, method: str, path: str, times: int | None = 1) -> None:
        """Answer 408, as a container to which the body of a request never came."""
        self._plain(method, path, times, 408, _MISSING)

    def limit_rate(
        self, method: str, path: str, times: int | None = 1, retry_after: int | None = None
    ) -> None:
        """Answer 429 of the kind that passes, with a Retry-After if one is given."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self._plain(method, path, times, 429, "modal-http: rate limit exceeded", headers)

    def limit_spending(self, method: str, path: str, times: int | None = None) -> None:
        """Answer 429 of the kind that does not pass: the workspace's money is spent."""
        self._plain(method, path, times, 429, f"modal-http: {_SPEND_LIMIT}")

    def undeploy(self, method: str, path: str, times: int | None = None) -> None:
        """Answer 404, as for an app that is not there."""
        self._plain(method, path, times, 404, "modal-http: invalid function call")

    def stop_app(self, method: str, path: str, times: int | None = None) -> None:
        """Answer 404, as for an app that was stopped."""
        words = "modal-http: app for invoked web endpoint is stopped"
        self._plain(method, path, times, 404, words)

    def disable_workspace(self, method: str, path: str, times: int | None = None) -> None:
        """Answer 404, as for a workspace that has not paid."""
        self._plain(method, path, times, 404, "modal-http: workspace ac-stub is disabled")

    def crash(self, method: str, path: str, times: int | None = 1) -> None:
        """Answer 500 without the app, as when its container dies of a request."""
        self._plain(method, path, times, 500, f"modal-http: {_CRASHED}")

    def clear(self) -> None:
        """Switch every fault off."""
        super().clear()
        with self._lock:
            self._run_twice.clear()
            self._redirects.clear()

    # For the edge.

    def redirects(self, method: str, path: str) -> bool:
        return self._take_one(self._redirects, method, path)

    def runs_twice(self, method: str, path: str) -> bool:
        return self._take_one(self._run_twice, method, path)

    def _take_one(self, rules: list[Rule], method: str, path: str) -> bool:
        with self._lock:
            for rule in rules:
                if rule.matches(method, path):
                    rule.left = None if rule.left is None else rule.left - 1
                    return True
        return False

    def _plain(
        self,
        method: str,
        path: str,
        times: int | None,
        status: int,
        body: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        fields = {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}
        self.fail(method, path, status=status, body=body, headers=fields, times=times)
