import uuid
from datetime import timedelta

from django.db import models
from django.utils.timezone import now

LOST_AFTER = timedelta(seconds=30)


class Job(models.Model):
    """Pictures that are made in the background; any process can tell how far they are."""

    class State(models.TextChoices):
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"
        CANCELLED = "cancelled"
        LOST = "lost"  # never stored: its process died

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    state = models.CharField(max_length=10, choices=State.choices, default=State.RUNNING)
    error = models.TextField(blank=True)
    num_samples = models.PositiveIntegerField()
    cancel_requested = models.BooleanField(default=False)
    created = models.DateTimeField(default=now)
    heartbeat = models.DateTimeField(default=now)

    @property
    def present_state(self):
        """The state; a running job without a heartbeat is lost."""
        if self.state == self.State.RUNNING and now() - self.heartbeat > LOST_AFTER:
            return self.State.LOST
        return self.State(self.state)


class Picture(models.Model):
    """One picture of a job, as a file below MEDIA_ROOT."""

    job = models.ForeignKey(Job, models.CASCADE, related_name="pictures")
    file = models.CharField(max_length=500)
    seed = models.BigIntegerField(null=True)
