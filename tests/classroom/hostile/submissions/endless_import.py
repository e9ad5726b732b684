"""Never finish loading."""

print("tried")
while True:
    pass
