"""Settings of the example; what is about ComfyUI stands at the end."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

DEBUG = os.environ.get("DJANGO_DEBUG", "1") == "1"
# In production the environment has to bring one: every process must have the same.
SECRET_KEY = "only-for-development" if DEBUG else os.environ["DJANGO_SECRET_KEY"]
ALLOWED_HOSTS = os.environ.get("DJANGO_ALLOWED_HOSTS", "localhost,127.0.0.1").split(",")

INSTALLED_APPS = ["pictures"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "studio.urls"
WSGI_APPLICATION = "studio.wsgi.application"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

# The state of jobs and their pictures must be seen by all processes, on all machines.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE_PATH", BASE_DIR / "db.sqlite3"),
        "OPTIONS": {"timeout": 20},
    }
}
MEDIA_ROOT = Path(os.environ.get("MEDIA_ROOT", BASE_DIR / "media"))

COMFY_SERVER = os.environ.get("COMFYUI_URL", "localhost:8188")
COMFY_OPTIONS = {"max_workers": 4}  # further arguments of ComfyServerWorkflowExecutor
COMFY_TEMPLATE = os.environ.get("COMFY_TEMPLATE", BASE_DIR / "workflow.json.jinja")
COMFY_TIMEOUT = 120.0  # seconds for a whole run, waiting in ComfyUI's queue included
