# What a control plane needs: to see every service and node with its checks, and to keep the mesh's policies.
service_prefix "" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

key_prefix "mesh/policies/" {
  policy = "write"
}
