# What the gateways of the edge "edge" need to elect one of them. A session belongs to the node of the agent that made it.
key "mesh/edge-leaders/edge" {
  policy = "write"
}

session_prefix "consul-" {
  policy = "write"
}
