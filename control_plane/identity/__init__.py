"""Who is who: the certificate authority, attestation, join tokens, rotation and revocation."""
