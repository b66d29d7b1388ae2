-- Have a stream that is empty number its entries by the clock again, whatever ids it has seen.
-- KEYS[1] stream
-- Returns 1, or 0: there are entries in it.
if redis.call('XLEN', KEYS[1]) > 0 then return 0 end
return redis.call('DEL', KEYS[1])
