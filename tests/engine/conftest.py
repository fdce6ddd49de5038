"""The small project as a fixture."""

from __future__ import annotations

import pytest
from small_project import Project, make_project


@pytest.fixture
def project(tmp_path) -> Project:
    return make_project(tmp_path)
