import os

import pytest

from rlrag.retrieval.milvus_collection import TOKEN
from tests.retrieval.milvus_places import SERVER, Place


@pytest.fixture
def place(request, tmp_path):
    if request.param == "file":
        yield Place(str(tmp_path / "corpus.db"))
    else:
        made = Place(SERVER)
        yield made
        import pymilvus

        client = pymilvus.MilvusClient(SERVER, token=os.environ.get(TOKEN, ""))
        client.drop_collection(made.collection)
        client.close()
