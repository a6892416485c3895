"""Celery's settings; a real site has a broker such as Redis or RabbitMQ here."""

import os

broker_url = os.environ.get("CELERY_BROKER_URL", "redis://localhost")
result_backend = os.environ.get("CELERY_RESULT_BACKEND", "redis://localhost")
worker_prefetch_multiplier = 1  # tasks are long: a child takes no second one in advance
task_soft_time_limit = 900  # seconds; raises in the task, which then cancels its run
