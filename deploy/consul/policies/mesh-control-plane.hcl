# What a control plane needs: to see every service and node with its checks, and to keep the mesh's policies and its edges'.
service_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

key_prefix "mesh/policies/" {
  policy = "write"
}

key_prefix "mesh/edge-policies/" {
  policy = "write"
}
