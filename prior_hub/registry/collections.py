"""Collections: a page of the Hub that lists repositories."""

from __future__ import annotations

from prior_hub.registry.client import explained, hub_client

__all__ = ["add_to_collection"]


def add_to_collection(
    repo_id: str,
    collection: str,
    *,
    note: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Add a prior to a collection, which is made if there is none of that title. What is in it already stays as it is.

    Args:
        repo_id: "organisation/name" of the prior.
        collection: the slug of a collection ("owner/title-64f9a55bb3115b4f513ec026", the end of its address), or a title:
            then the collection of that title of the prior's owner.
        note: shown beside the prior, at most 500 characters.
        private: make a new collection private.
        token: an access token; the logged-in one when None.

    Returns:
        The collection's address.

    Raises:
        PriorAccessError: the token may not change the collection.
        PriorNotFoundError: no such prior.
        PriorHubError: no such collection, or the Hub does not accept it.
        PriorConnectionError: the Hub cannot be reached or fails.
    """
    api = hub_client(token)
    with explained(repo_id, None, None):
        slug = collection
        if "/" not in collection:
            owner = repo_id.split("/")[0]
            slug = api.create_collection(collection, namespace=owner, private=private, exists_ok=True).slug
        return api.add_collection_item(slug, repo_id, "model", note=note, exists_ok=True).url
