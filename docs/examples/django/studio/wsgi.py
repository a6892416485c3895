import os
from importlib import import_module

from django.conf import settings
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
application = get_wsgi_application()
# Now, before gunicorn forks, and not in each process at its first request.
import_module(settings.ROOT_URLCONF)
