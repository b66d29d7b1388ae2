-- Give up the leader's lease, if it is still held.
-- KEYS[1] leader
-- ARGV[1] own id   ARGV[2] own term
-- Returns 1 if it was held, else 0.
local held = redis.call('HMGET', KEYS[1], 'id', 'term')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
return 1
