from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from gateway.descriptors import reachable, read
from gateway.errors import DescriptorError
from tests.gateway.compiling import NASTY, SHOP, compile_files, compile_text, nasty, shop


def test_services_methods_and_comments_are_found() -> None:
    api = shop()
    assert list(api.services) == [
        *("shop.v1.InventoryService", "shop.v1.NotificationService", "shop.v1.OrderService"),
        *("shop.v1.PaymentService", "shop.v1.ShippingService"),
    ]
    assert [method.name for method in api.services["shop.v1.OrderService"]] == [
        *("PlaceOrder", "GetOrder", "ListOrders", "UpdateOrder", "CancelOrder")
    ]
    assert api.comment("shop.v1.GetStockRequest.sku") == "Stock keeping unit."
    assert api.comment("shop.v1.OrderState.ORDER_STATE_PAID") == ""


def test_comments_of_nested_types_and_enums_are_found() -> None:
    text = """syntax = "proto3"; message A {
      // Nested.
      message B {
        // Field.
        int32 c = 1;
      }
      // Inner enum.
      enum E { X = 0; }
    }
    // Outer enum.
    enum F { Y = 0; }
    // Service.
    service S {}
    """
    comments = read([compile_text({"t.proto": text})]).comments
    assert comments == {"A.B": "Nested.", "A.B.c": "Field.", "A.E": "Inner enum.", "F": "Outer enum.", "S": "Service."}


def test_several_sets_that_agree_are_one_api() -> None:
    inventory = compile_files(SHOP, "shop/v1/inventory.proto")
    orders = compile_files(SHOP, "shop/v1/orders.proto")
    assert list(read([inventory, orders, inventory]).services) == ["shop.v1.InventoryService", "shop.v1.OrderService"]


def test_sets_that_differ_in_comments_only_agree() -> None:
    one = compile_text({"t.proto": 'syntax = "proto3"; message A {}'})
    other = compile_text({"t.proto": 'syntax = "proto3";\n// A.\nmessage A {}'})
    assert read([one, other]).services == {}


def test_sets_that_contradict_each_other_are_refused_by_name() -> None:
    one = compile_text({"t.proto": 'syntax = "proto3"; message A { int32 a = 1; }'})
    other = compile_text({"t.proto": 'syntax = "proto3"; message A { string a = 1; }'})
    with pytest.raises(DescriptorError, match=r"t\.proto is there twice, with different contents"):
        read([one, other])


def test_a_type_that_two_files_define_is_refused() -> None:
    one = compile_text({"one.proto": 'syntax = "proto3"; message A { int32 a = 1; }'})
    other = compile_text({"two.proto": 'syntax = "proto3"; message A { string a = 1; }'})
    with pytest.raises(DescriptorError, match=r"two\.proto cannot be used with the other files: .*A"):
        read([one, other])


def test_a_set_without_its_imports_says_how_to_write_it() -> None:
    parsed = FileDescriptorSet.FromString(compile_files(NASTY, "nasty/v1/nasty.proto"))
    alone = FileDescriptorSet(file=[file for file in parsed.file if file.name == "nasty/v1/nasty.proto"])
    with pytest.raises(DescriptorError, match=r"imports .*, which is not there; .*--include_imports"):
        read([alone.SerializeToString()])


def test_what_is_no_descriptor_set_is_refused() -> None:
    with pytest.raises(DescriptorError, match="not a descriptor set"):
        read([b"\xff\xff"])


def test_reachable_types_follow_maps_and_rings() -> None:
    method = next(m for m in nasty().services["nasty.v1.LibraryService"] if m.name == "FindBooks")
    names = [message.full_name for message in reachable(method.input, method.output)]
    assert names == sorted(names)
    assert {"nasty.v1.FindBooksRequest.Filter", "nasty.v1.Book", "nasty.other.Money"} <= set(names)
    assert not any(name.endswith("Entry") for name in names)
